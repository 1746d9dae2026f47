#!/usr/bin/env bash
# Create a virtual environment and install the package into it, if not done yet.
#
#   scripts/install.sh [EXTRA[,EXTRA]]      "test" for what the tests need, "dev" for what changing the code needs
#
# VENV    folder of the environment (.venv)
# PYTHON  interpreter to make it with (the first of python3, python3.12,
#         python3.11 that is Python 3.11 or 3.12)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
extra=${1:-}
stamp=$venv/.installed${extra:+-$extra}

if [[ ! -x $venv/bin/python ]]; then
  python=
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [[ -z $python ]]; then
    echo "install.sh: needs Python 3.11 or 3.12 (set PYTHON to one)" >&2
    exit 1
  fi
  echo "Creating $venv with $("$python" --version)"
  "$python" -m venv "$venv" || {
    echo "install.sh: '$python -m venv' failed (on Debian and Ubuntu: apt install python3-venv)" >&2
    rm -rf "$venv"
    exit 1
  }
fi

if [[ ! -e $stamp || pyproject.toml -nt $stamp ]]; then
  other=$("$venv/bin/python" -Pc 'import importlib.util as u; s = u.find_spec("momoe_titan"); print(s.origin if s else "")')
  if [[ -n $other && ! $other -ef momoe_titan/__init__.py ]]; then
    echo "install.sh: this clone takes the place of $other in $venv"
  fi
  echo "Installing momoe_titan${extra:+[$extra]} into $venv (PyTorch is a large download)"
  "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
    --editable ".${extra:+[$extra]}"
  touch "$stamp"
fi
