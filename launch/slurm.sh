#!/usr/bin/env bash
# Trains on several hosts under Slurm, with one process per GPU:
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/ar_5b.py:64s --workdir=DIR --out=DIR
#
# DIR must be on a file system that all hosts mount. Shortly before the time limit, Slurm sends
# SIGTERM: the run writes a checkpoint, and the job is requeued and resumes from it.
#SBATCH --job-name=longlive
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
here=${SLURM_SUBMIT_DIR:-$PWD}
# --kill-on-bad-exit: one failed process ends all; JAX's heartbeat detects those that only hang.
# --gpu-bind=none: JAX selects a process's GPU by its local rank (SLURM_LOCALID) among all GPUs of
# the host. If every process were bound to one GPU, which is then its number 0, only local rank 0
# would find a GPU.
# --cpus-per-task: srun does not inherit it from the batch job.
srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    "$here/.venv/bin/longlive" train --hosts=auto "$@"
code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
