#!/bin/bash
# A recipe on the nodes of a Slurm job, one process per GPU; the run folder must be on a disk that all of them see.
#   sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sh recipes/forget_lora.yaml [key=value ...]
#   LAUNCH=launch/fsdp2.yaml sbatch …          # the model spread over all GPUs instead of copied to each
#SBATCH --job-name=llm-unlearn
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
set -euo pipefail

# Slurm runs a copy of this file; what it names is looked for where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}"
export LAUNCH="${LAUNCH:-launch/multi_node.yaml}"
export GPUS="${SLURM_GPUS_ON_NODE:?ask for GPUs: sbatch --gpus-per-node N}"
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
export HEAD PORT="$((20000 + SLURM_JOB_ID % 20000))"

# One task on each node; its processes find the others by the first host. SLURM_NODEID differs between tasks, so they fill it in.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$LAUNCH" \
  --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$HEAD" --main_process_port "$PORT" --rdzv_backend static "$@"' bash "$@"
