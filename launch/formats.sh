#!/usr/bin/env bash
# The quality cost of NVFP4 on the built-in model: ./launch/formats.sh [STEPS]   (default: 1000)
# Continues training the built-in DiT in bf16 and in NVFP4, with the same data and seeds. Then
# evaluates both, and the bf16 one quantized after training, each with a bf16 and an NVFP4 KV cache.
# Writes runs/formats. Resumes an interrupted run if the same command is given again.
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
