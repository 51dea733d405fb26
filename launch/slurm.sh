#!/usr/bin/env bash
# Trains on several hosts under Slurm, a process a GPU:
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/ar_5b.py:64s --workdir=DIR --out=DIR
#
# DIR must be seen by all hosts. When time is nearly up Slurm sends SIGTERM: the run saves, and the
# job is put back into the queue, where it goes on from there.
#SBATCH --job-name=longlive
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
here=${SLURM_SUBMIT_DIR:-$PWD}
# One dead process ends the step for all; the heartbeat finds those that only hang.
srun --kill-on-bad-exit=1 --gpus-per-task=1 \
    "$here/.venv/bin/longlive" train --hosts=auto "$@"
code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
