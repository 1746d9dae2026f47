#!/usr/bin/env bash
# Install what is missing, then train.
#
#   scripts/train.sh [CONFIG.toml] [--section.field VALUE ...]
#
# CONFIG is train_configs/debug_model.toml unless given.
# NPROC  processes, one per GPU (1)
# LOG_RANK  the one whose output is shown (0)
# VENV, PYTHON: see install.sh
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install.sh dashboard,hf   # for the page of runs, and for exports
config=train_configs/debug_model.toml
if [[ ${1:-} == *.toml ]]; then
  config=$1
  shift
fi

bin=${VENV:-.venv}/bin
if [[ ${NPROC:-1} == 1 ]]; then
  exec "$bin/python" -m momoe_titan.train --job.config_file "$config" "$@"
fi
exec "$bin/torchrun" --nproc_per_node="$NPROC" --rdzv_backend=c10d --rdzv_endpoint=localhost:0 \
  --local-ranks-filter="${LOG_RANK:-0}" --role=rank --tee=3 \
  -m momoe_titan.train --job.config_file "$config" "$@"
