#!/usr/bin/env bash
# Make an environment with mergekit alone, for the comparison of tests/benchmarks/side_by_side.py:
#
#   tests/benchmarks/mergekit.sh FOLDER        TORCH_INDEX names an index with a CPU build of torch
set -euo pipefail
folder=$1
test -x "$folder/bin/mergekit-yaml" && exit 0
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
"$folder/bin/pip" install --quiet mergekit==0.1.5
