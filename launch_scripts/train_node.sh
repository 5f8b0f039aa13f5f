#!/usr/bin/env bash
# Train on the GPUs of one node.
#   PRESET=L TP=2 launch_scripts/train_node.sh [--dry-run] --data-path runs/data/train --save runs/L ...
# PRESET  model size, see hrm_megatron/config.py (default B)
# TP PP CP  tensor, pipeline and context parallel sizes (default 1 each)
# DP      data parallel size (default: the GPUs of this node / (TP * PP * CP))
# LAYOUT  preset: the preset's layout for 8 GPUs instead of TP, PP, CP and DP, with its micro-batch size and
#         recomputation (docs/scaling.md)
# MAX_RESTARTS  number of restarts if a rank dies (default 0)
# TORCHRUN  the launcher (default: torch.distributed.run of PYTHON if that is set, else torchrun of .venv or on PATH)
# PYTHON  (default: that of .venv, else the one on PATH)
# All other arguments are passed to hrm_megatron.pretrain. --dry-run prints the command without running it.
set -euo pipefail

dry_run=false
arguments=()
for argument in "$@"; do
    case $argument in
        --help | -h) awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0" && exit ;;
        --dry-run) dry_run=true ;;
        *) arguments+=("$argument") ;;
    esac
done

preset=${PRESET:-B} tp=${TP:-1} pp=${PP:-1} cp=${CP:-1}
for size in "$tp" "$pp" "$cp" "${DP:-1}"; do
    if ! [[ $size =~ ^[1-9][0-9]*$ ]]; then
        echo "train_node.sh: TP, PP, CP and DP are whole numbers from 1, not '$size'" >&2
        exit 2
    fi
done

layout=(--tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp" --context-parallel-size "$cp")
if ((tp > 1)); then layout+=(--sequence-parallel); fi
model_ranks=$((tp * pp * cp))
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
if [ "${LAYOUT:-}" = preset ]; then
    if [ -n "${TP:-}${PP:-}${CP:-}${DP:-}" ]; then
        echo "train_node.sh: LAYOUT=preset chooses TP, PP, CP and DP: leave them out" >&2
        exit 2
    fi
    python=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
    if ! command -v "$python" >/dev/null; then python=python; fi
    flags=$("$python" -m hrm_megatron.planner.presets "$preset" "$gpus")
    read -ra layout <<<"$flags"
    model_ranks=1 DP=$gpus
elif [ -n "${LAYOUT:-}" ]; then
    echo "train_node.sh: LAYOUT=$LAYOUT: the only one that is known is preset" >&2
    exit 2
elif [ -z "${DP:-}" ]; then
    if ((gpus == 0)); then gpus=$model_ranks; fi # no GPU: one replica, on the CPU
    if ((gpus % model_ranks != 0)); then
        echo "train_node.sh: TP*PP*CP=$model_ranks does not divide the $gpus GPUs of this node; set DP" >&2
        exit 2
    fi
    DP=$((gpus / model_ranks))
fi

# Restarted ranks must not find the addresses of dead ones (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
if [ -n "${TORCHRUN:-}" ]; then
    launcher=("$TORCHRUN")
elif [ -n "${PYTHON:-}" ]; then
    launcher=("$PYTHON" -m torch.distributed.run)
else
    launcher=("$(dirname "$0")/../.venv/bin/torchrun")
    if ! [ -x "${launcher[0]}" ]; then launcher=(torchrun); fi
fi

command=("${launcher[@]}" --standalone --max-restarts "${MAX_RESTARTS:-0}" --nproc-per-node $((model_ranks * DP))
    -m hrm_megatron.pretrain --hrm-preset "$preset" "${layout[@]}")
command+=(${arguments[@]+"${arguments[@]}"})

if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
if ! command -v "${launcher[0]}" >/dev/null; then
    echo "train_node.sh: no ${launcher[0]}: run make setup, or set TORCHRUN or PYTHON" >&2
    exit 127
fi
if ((${#launcher[@]} > 1)) && ! "$PYTHON" -c 'import importlib.util as i; i.find_spec("torch") or exit(1)'; then
    echo "train_node.sh: PYTHON=$PYTHON does not find torch: unset it for .venv, or name one that does" >&2
    exit 127
fi
exec "${command[@]}"
