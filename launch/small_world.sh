#!/usr/bin/env bash
# Makes the built-in model anew, all stages: ./launch/small_world.sh [RUNS]   (default: runs)
# About two and a half hours on two CPU cores (configs/small_world.py says of what); a run that was
# stopped goes on where it was when the same command is given again.
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
