#!/usr/bin/env bash
# Install what is missing, then run the tests: in several processes, or in one where there is a GPU.
#
#   scripts/test.sh [options of pytest]
#
# GPU tests are skipped where there is no GPU; -m gpu runs only those. -n 0 runs all in one process.
# VENV, PYTHON: see install.sh
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install.sh test
# Tests on a GPU measure its memory, so that they must be alone on it.
processes=0
if ! nvidia-smi -L >/dev/null 2>&1; then
  processes=$(nproc)
  processes=$((processes < 8 ? processes : 8))
fi
# worksteal: each process runs one stretch of the list, so that what a file's tests share is made once or twice.
exec "${VENV:-.venv}/bin/python" -m pytest -n "$processes" --dist worksteal --durations=15 "$@"
