#!/usr/bin/env bash
# Put small faults into the package, one at a time, and say which of them the tests that concern them do not see.
#
#   scripts/mutation.sh [ROOM...]     rooms: moe components data config memory model/parallel kernels; all by default
#
# COUNT faults of each room (50), SECONDS_AT_MOST for all (7200), PROCESSES (2), SEED (0). Started again, it goes on
# with the sample that it finds in mutation/.
# VENV, PYTHON: see install.sh
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install.sh test
python="${VENV:-.venv}/bin/python"
"$python" -c "import cosmic_ray" 2>/dev/null || "$python" -m pip install --quiet "cosmic-ray>=8.4,<9"
rooms=()
if [ $# -gt 0 ]; then rooms=(--rooms "$@"); fi
mkdir -p mutation
if [ -f mutation/mutants.json ]; then
  echo "Going on with the sample in mutation/mutants.json, whatever rooms, COUNT and SEED say; without it, a new one is drawn." >&2
else
  "$python" -W ignore -m tests.trust.mutate sample "${rooms[@]}" --count "${COUNT:-50}" --seed "${SEED:-0}" \
    --out mutation/mutants.json
fi
exec "$python" -m tests.trust.mutate run mutation/mutants.json --processes "${PROCESSES:-2}" \
  --seconds "${SECONDS_AT_MOST:-7200}" --out mutation
