#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process: ./launch/local.sh --config=... --workdir=... --out=...
# config.mesh.data * fsdp * sp must equal the number of GPUs.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
exec "$here/.venv/bin/longlive" train "$@"
