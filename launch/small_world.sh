#!/usr/bin/env bash
# Retrains all stages of the built-in model: ./launch/small_world.sh [RUNS]   (default: runs)
# Takes about two and a half hours on two CPU cores (see configs/small_world.py). Resumes an
# interrupted run if the same command is given again.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
runs=${1:-runs}
. "$here/launch/setup.sh"
(cd "$here" && setup)
for stage in vae text recycled; do
    "$here/.venv/bin/longlive" train --config="configs/small_world.py:$stage" \
        --workdir="$runs/$stage" --out="$runs/small_world"
done
"$here/.venv/bin/longlive" evaluate --config=configs/small_world.py:evaluate \
    --checkpoint="$runs/small_world" --out="$runs/evaluation"
