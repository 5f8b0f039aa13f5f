#!/usr/bin/env bash
# Train on the GPUs of many nodes under Slurm.
#   PRESET=XL TP=2 PP=4 sbatch --nodes 8 --gpus-per-node 8 launch_scripts/train_slurm.sh --data-path DIR/train --save DIR ...
#SBATCH --job-name=hrm
#SBATCH --ntasks-per-node=1
#SBATCH --output=hrm-%j.log
# One task per node: srun starts a torchrun there, and the first node is where all meet.
# PRESET  size, see hrm_megatron/config.py (default B)
# TP PP CP  tensor, pipeline and context parallel ranks (default 1 each); what they leave is data parallel
# GPUS    per node (default: what Slurm gave the job, SLURM_GPUS_ON_NODE)
# TORCHRUN, MASTER_PORT  the launcher (default: that of .venv, else on PATH) and a free port (default 29500)
# Relative paths are relative to the folder that the job was submitted from.
# Every other argument goes to hrm_megatron.pretrain as it is. --dry-run prints the command and runs nothing; it works
# outside a job too, with NODES and GPUS set.
set -euo pipefail

dry_run=false
arguments=()
for argument in "$@"; do
    case $argument in
        --help | -h) awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$0" && exit ;;
        --dry-run) dry_run=true ;;
        *) arguments+=("$argument") ;;
    esac
done
if $dry_run && [ -z "${SLURM_JOB_ID:-}" ]; then
    SLURM_NNODES=${NODES:?outside a Slurm job --dry-run needs the number of nodes: set NODES}
    SLURM_JOB_ID=JOB_ID SLURM_JOB_NODELIST=
elif [ "${NODES:-${SLURM_NNODES:-}}" != "${SLURM_NNODES:-}" ]; then
    echo "train_slurm.sh: NODES=$NODES, but Slurm gave the job ${SLURM_NNODES:-no} nodes: leave NODES out" >&2
    exit 2
fi

root=$(cd "$(dirname "$0")/.." && pwd)
if ! [ -d "$root/hrm_megatron" ]; then root=${SLURM_SUBMIT_DIR:-$PWD}; fi # sbatch runs a copy of this file
preset=${PRESET:-B} tp=${TP:-1} pp=${PP:-1} cp=${CP:-1}
nodes=${SLURM_NNODES:?not inside a Slurm job: use sbatch or salloc, or launch_scripts/train_node.sh for one node}
gpus=${GPUS:-${SLURM_GPUS_ON_NODE:?Slurm gave no GPUs: add --gpus-per-node, or set GPUS}}
for size in "$tp" "$pp" "$cp" "$nodes" "$gpus"; do
    if ! [[ $size =~ ^[1-9][0-9]*$ ]]; then
        echo "train_slurm.sh: TP, PP, CP, GPUS and the number of nodes are whole numbers from 1, not '$size'" >&2
        exit 2
    fi
done
if ((nodes * gpus % (tp * pp * cp) != 0)); then
    echo "train_slurm.sh: TP*PP*CP=$((tp * pp * cp)) does not divide the $((nodes * gpus)) GPUs of the job" >&2
    exit 2
fi

if [ -n "${SLURM_JOB_NODELIST?Slurm gave no list of nodes}" ]; then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
else
    hosts=FIRST_NODE
fi
master=${hosts%%$'\n'*}
torchrun=${TORCHRUN:-$root/.venv/bin/torchrun}
if ! [ -x "$torchrun" ]; then torchrun=torchrun; fi

command=(srun --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1 "$torchrun"
    --nnodes "$nodes" --nproc-per-node "$gpus"
    --rdzv-id "${SLURM_JOB_ID:?}" --rdzv-backend c10d --rdzv-endpoint "$master:${MASTER_PORT:-29500}"
    -m hrm_megatron.pretrain
    --hrm-preset "$preset"
    --tensor-model-parallel-size "$tp"
    --pipeline-model-parallel-size "$pp"
    --context-parallel-size "$cp")
if ((tp > 1)); then command+=(--sequence-parallel); fi
command+=(${arguments[@]+"${arguments[@]}"})

if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
