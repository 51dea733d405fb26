#!/usr/bin/env bash
# The effect of error recycling on long videos: ./launch/recycling.sh [STEPS]   (default: 1000)
# Continues training the built-in DiT with and without recycling, with the same data and seeds, and
# evaluates minute-long videos that each model samples in 4 steps. Writes
# runs/recycling/{off,on}.report. Resumes an interrupted run if the same command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
steps=${1:-1000}
. launch/setup.sh
. launch/train_on.sh
setup
folder=runs/recycling
train_on "$folder" off "$steps" ar
train_on "$folder" on "$steps" recycled --config.recycling.start=0
for name in off on; do
    .venv/bin/longlive evaluate --config=configs/small_world.py:evaluate --parts=long \
        --config.evaluate.batch=16 \
        --config.evaluate.sample.steps=4 --config.evaluate.sample.solver=unipc \
        --checkpoint="$folder/$name" --out="$folder/$name.report"
done
