#!/usr/bin/env bash
# What NVFP4 costs the built-in model, in one table: ./launch/formats.sh [STEPS]   (default: 1000)
# Trains the built-in DiT on, once in bf16 and once in NVFP4 with the same data and seeds, then
# judges both, and the first one packed afterwards, each with a bf16 and an NVFP4 cache, into
# runs/formats. A run that was stopped goes on where it was when the same command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
steps=${1:-1000}
. launch/setup.sh
. launch/train_on.sh
setup
formats=runs/formats
train_on "$formats" bf16 "$steps" ar
train_on "$formats" nvfp4 "$steps" ar --config.quant.policy=nvfp4_train
.venv/bin/longlive curves bf16="$formats/bf16.run" nvfp4="$formats/nvfp4.run" \
    --out="$formats/curves.png"
.venv/bin/longlive evaluate --config=configs/small_world.py:formats --parts=compared \
    --checkpoint="$formats/bf16" --out="$formats/report"
