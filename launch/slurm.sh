#!/usr/bin/env bash
# A training run on GPU nodes under Slurm: one task a node, all its GPUs.
#
#   sbatch --nodes=8 launch/slurm.sh --config=configs/llada_8b.py:h200:8x8 \
#       --workdir=/shared/runs/llada_8b
#
# Arguments go to `dllm train`. The working directory must be on a disk that all
# nodes share. The job is put back into the queue when it fails or is preempted,
# and then continues from its last complete checkpoint; it is not when the
# command itself is wrong (exit status 2).
#SBATCH --job-name=dllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dllm-%j.log
# Ten minutes before the time is up, to save, and to go back into the queue.
#SBATCH --signal=B:TERM@600
set -euo pipefail

restarts="${DLLM_RESTARTS:-20}"
dllm="${DLLM:-dllm}"

# jax would give a task one GPU, the one of its number on the node.
gpus="${SLURM_GPUS_ON_NODE:-8}"
JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((gpus - 1)))"
export JAX_LOCAL_DEVICE_IDS

# A run that was told to stop is not done: it goes back into the queue.
export DLLM_INTERRUPTED_STATUS=75
srun --kill-on-bad-exit=1 "$dllm" train "$@" &
step=$!
# One host that is told is enough; scancel's SIGTERM is passed on as well.
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0" || true' TERM
status=0
wait "$step" || status=$?
# `wait` returns when the signal comes; the step is then still saving.
while kill -0 "$step" 2>/dev/null; do
  status=0
  wait "$step" || status=$?
done

if [[ "$status" -eq 2 ]]; then
  echo "slurm.sh: the command is wrong; not started again" >&2
  exit 2
fi
if [[ "$status" -eq 0 ]]; then
  exit 0
fi
if [[ "${SLURM_RESTART_COUNT:-0}" -ge "$restarts" ]]; then
  echo "slurm.sh: gave up after $restarts restarts" >&2
  exit 1
fi
echo "slurm.sh: exit status $status, back into the queue" >&2
scontrol requeue "$SLURM_JOB_ID"
