# Sourced by launch/formats.sh and launch/recycling.sh, after launch/setup.sh.

train_on() { # train_on FOLDER NAME STEPS ARGUMENT [OPTION...]: trains the built-in DiT further
    # Writes the checkpoint to FOLDER/NAME and the run to FOLDER/NAME.run.
    local folder=$1 name=$2 steps=$3 stage=$4 other
    shift 4
    mkdir -p "$folder/$name.run"
    [ -d "$folder/$name" ] || cp -r longlive_jax/assets/small_world "$folder/$name"
    for other in "$folder"/*.run/corpus.npz; do # all runs of a folder use one corpus
        [ -f "$other" ] && ! [ "$other" -ef "$folder/$name.run/corpus.npz" ] &&
            ln -f "$other" "$folder/$name.run/corpus.npz" && break
    done
    .venv/bin/longlive train --config="configs/small_world.py:$stage" --config.start=checkpoint \
        --config.loop.steps="$steps" --config.loop.seed=2 --config.optim.lr=0.005 "$@" \
        --workdir="$folder/$name.run" --out="$folder/$name"
}
