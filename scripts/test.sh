#!/usr/bin/env bash
# Install what is missing, then run the tests.
#
#   scripts/test.sh [options of pytest]
#
# GPU tests are skipped where there is no GPU; -m gpu runs only those.
# VENV, PYTHON: see install.sh
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install.sh test
exec "${VENV:-.venv}/bin/python" -m pytest "$@"
