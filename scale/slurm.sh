#!/bin/bash
# T-PPO on several machines under Slurm: one torchrun per machine, which starts a rank per GPU. Tried with
# stand-ins for Slurm's commands (tests/scale/test_slurm.py); no cluster was at hand.
#
#   sbatch --nodes 8 scale/slurm.sh --config scale/configs/qwen2.5-32b-math.yaml [--section.field VALUE ...]
#   sbatch --nodes 8 scale/slurm.sh pretrain-value --config scale/configs/qwen2.5-32b-math.yaml --algo.model.value null ...
#
# Submit from the repository's root, in a folder that all machines see, as they must see algo.run.out. Account, partition and other
# numbers of GPUs or cores go on sbatch's command line; another Python than .venv's by TPPO_PYTHON=$(which python), options of torchrun by
# TPPO_TORCHRUN="--log-dir logs --tee 3". Two minutes before the time limit the job puts itself back into the queue; it,
# and a job that Slurm requeues after a machine failed, goes on from the newest checkpoint where there is one: what that may cost is
# algo.run.checkpoint_every steps, and the step in which a checkpoint was still being written.
#SBATCH --job-name=tppo
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@120

set -euo pipefail

: "${TPPO_PYTHON:=.venv/bin/python}" # the environment that docs/scale.md installs
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))

export OMP_NUM_THREADS=4
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-64} # since Slurm 22.05 srun takes sbatch's number no more by itself
export HF_HUB_OFFLINE=1 # models and prompts are on disk: nothing is fetched while 64 GPUs wait
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

RESUME=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [[ "${1:-}" == --* || "${1:-}" == train ]]; then
    RESUME=(--cluster.requeued true)
fi

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 "$TPPO_PYTHON" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$SLURM_JOB_ID" ${TPPO_TORCHRUN:-} \
    scale/launch.py "$@" "${RESUME[@]}" &
wait $! # not a plain srun: bash runs a trap only between commands, and during `wait`
