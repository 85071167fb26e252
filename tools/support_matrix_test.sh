#!/usr/bin/env bash
# docs/support.md is what dlattn-info prints; after a change to the kernel table: ./dev support
set -euo pipefail
DLATTN_LIBRARY=$PWD/libdlattn.so.1 tools/dlattn-info --markdown | diff docs/support.md -
