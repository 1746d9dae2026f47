#!/usr/bin/env bash
# Run the tests beside TorchTitan 0.3, in an environment of its own that borrows all else from the usual one.
#
#   scripts/test_torchtitan_03.sh [options of pytest]
#
# VENV, PYTHON: see install.sh; the environment of its own is "$VENV-torchtitan-03"
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install.sh test
usual=${VENV:-.venv}
venv=$usual-torchtitan-03
stamp=$venv/.installed
if [[ ! -e $stamp ]]; then
  "$usual/bin/python" -m venv "$venv"
  borrowed=$("$usual/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$borrowed" >"$own/borrowed.pth"
  # What 0.3 wants beyond what 0.2.2 brings. Its other dependencies are those of 0.2.2, and wandb, which is optional.
  "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --no-deps \
    "torchtitan==0.3.0" "datasets>=3.6,<4.8" "torch_checkpointing>=0.1" "spmd_types==0.2.3"
  touch "$stamp"
fi
if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then # as test.sh does
  unset PYTHONDONTWRITEBYTECODE
  export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$(realpath "$usual")/pycache}
fi
PYTHONPATH=$PWD exec "$venv/bin/python" -m pytest tests/torchtitan_03 "$@"
