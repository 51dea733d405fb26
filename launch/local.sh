#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process: ./launch/local.sh --config=... --workdir=... --out=...
# config.mesh.data * fsdp * sp must equal the number of GPUs.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
if ! [ -x "$here/.venv/bin/longlive" ]; then
    echo "No $here/.venv/bin/longlive; run ./launch/demo.sh, then .venv/bin/pip install -e '.[gpu]' -c constraints.txt" >&2
    exit 2
fi
exec "$here/.venv/bin/longlive" train "$@"
