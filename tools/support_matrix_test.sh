#!/usr/bin/env bash
# docs/support.md is what dlattn-info prints; after a change to the kernel table:
#     DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 bazel-bin/tools/dlattn-info --markdown >docs/support.md
set -euo pipefail
DLATTN_LIBRARY=$PWD/libdlattn.so.1 tools/dlattn-info --markdown | diff docs/support.md -
