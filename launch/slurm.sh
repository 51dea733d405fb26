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
# One dead process ends the step for all; the heartbeat finds those that only hang. Every process
# sees all GPUs of its host and JAX takes the one of its rank there (SLURM_LOCALID): bound to one
# GPU each, which is number 0 to all of them, the others would find none. srun does not take over
# the CPUs a task by itself.
srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    "$here/.venv/bin/longlive" train --hosts=auto "$@"
code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
