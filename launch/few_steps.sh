#!/usr/bin/env bash
# The tables of few-step models: ./launch/few_steps.sh [TABLE [CHECKPOINT [RUNS]]]
# TABLE is few_steps, precision, leak, standalone or summary (default). Distils CHECKPOINT (default:
# the built-in model) as far as the table needs, in RUNS (default: runs/few_steps), and evaluates.
# `standalone` distils the bidirectional model RUNS/base, which it trains first.
# Resumes an interrupted run if the same command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
table=${1:-summary} checkpoint=${2:-small_world} runs=${3:-runs/few_steps}
. launch/setup.sh
setup

distil() { # distil NAME OPTIONS FROM [SETTING...]: writes the adapter to RUNS/NAME
    local name=$1 options=$2 from=$3
    shift 3
    [ -n "$from" ] && set -- "$@" --config.init_adapters="$runs/$from"
    .venv/bin/longlive train --config="configs/small_world.py:dmd$options" \
        --config.checkpoint="$checkpoint" "$@" --workdir="$runs/$name.run" --out="$runs/$name"
}

base() { # the bidirectional model, beside the encoders of the built-in one
    if [ ! -d "$runs/base" ]; then
        rm -rf "$runs/base.partial" && mkdir -p "$runs"
        cp -r longlive_jax/assets/small_world "$runs/base.partial"
        mv "$runs/base.partial" "$runs/base"
    fi
    .venv/bin/longlive train --config=configs/small_world.py:base \
        --workdir="$runs/base.run" --out="$runs/base"
}

distil steps_4 "" ""
case $table in
few_steps)
    distil steps_3 ,three_step steps_4
    distil steps_2 ,two_step steps_4
    distil steps_1 ,one_step steps_2
    ;;
precision)
    distil steps_2 ,two_step steps_4
    distil nvfp4_generator ,nvfp4_student steps_4
    distil nvfp4_real_score ,nvfp4_teacher steps_4
    distil nvfp4 ,nvfp4 steps_4
    distil nvfp4_2 ,two_step,nvfp4 steps_2
    ;;
summary)
    distil steps_2 ,two_step steps_4
    distil nvfp4 ,nvfp4 steps_4
    distil nvfp4_2 ,two_step,nvfp4 steps_2
    ;;
leak) distil leak ,leak "" ;;
standalone)
    base
    checkpoint="$runs/base" distil standalone ,standalone ""
    ;;
*)
    echo "few_steps.sh: no table $table; choose few_steps, precision, leak, standalone or summary" >&2
    exit 2
    ;;
esac
.venv/bin/longlive evaluate --config=configs/small_world.py:few_steps --parts="$table" \
    --config.evaluate.runs="$runs" --checkpoint="$checkpoint" --out="$runs/report"
