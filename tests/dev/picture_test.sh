#!/usr/bin/env bash
# docs/speed.svg, which the README shows, is what bench/results say.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

./dev picture --check
echo "the picture is that of bench/results"
