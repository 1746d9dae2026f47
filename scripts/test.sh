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
  processes=$(($(nproc) * 3 / 2)) # while some wait: for ranks, for agents that meet, for a job that is killed
  processes=$((processes < 8 ? processes : 8))
fi
# Without files of bytecode each process, and each that a test starts, would compile torch and the rest anew: 18 seconds
# of 24. Where the environment wants none beside the sources, they are kept in the virtual environment.
venv=${VENV:-.venv}
if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then
  unset PYTHONDONTWRITEBYTECODE
  export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$(realpath "$venv")/pycache}
fi
# worksteal: each process runs one stretch of the list, so that what a file's tests share is made once or twice.
exec "$venv/bin/python" -m pytest -n "$processes" --dist worksteal --durations=15 "$@"
