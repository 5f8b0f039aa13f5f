#!/usr/bin/env bash
# From your own questions and answers to a trained and exported model.
#   DATA=my.jsonl OUT=runs/mine examples/own_data.sh [flags of hrm_megatron.pretrain, such as --bf16]
# Set these in the environment, or edit them in a copy of this file beside it. Paths are relative to where you stand.
# Started again it goes on where it stopped; other data or other settings of the data need another OUT.
# With --dry-run, --skip-train or --print-config there is nothing new to export, and it ends before that.

# Rows like {"condition": "direct", "instruction": "What is 2 + 3?", "response": "5"}, chats or alpaca rows: a file, a glob
# in quotes, or a folder. They may be jsonl, plain or in .gz or .zst, Parquet, Arrow or a dataset saved to disk: see
# docs/data.md. The condition is a comma-separated list of direct, cot, noisy, synth, or empty.
DATA=${DATA:-}
OUT=${OUT:-runs/own_data}
JSON_KEYS=${JSON_KEYS:-condition instruction response} # the names of these fields in your rows
ROW_SHAPE=${ROW_SHAPE:-auto} # or fields, messages, alpaca: what the rows are, told from the first
IGNORE_FIELDS=${IGNORE_FIELDS:-} # parts of prompts to leave out, such as context: a row with one ends the run
SPLIT_SENTENCES=${SPLIT_SENTENCES:-} # 1: DATA holds plain documents, rows with a field text or files of .txt and .md
DEFAULT_CONDITION=${DEFAULT_CONDITION-refuse} # of rows that have none: direct in the reference, '' for no tags
ON_BAD_ROW=${ON_BAD_ROW:-error} # or skip: count and leave out rows that cannot be read
export PRESET=${PRESET:-B} # B, L, XL, XXL or XXL_wide: see hrm_megatron/config.py
VOCAB_SIZE=${VOCAB_SIZE:-65536} # at most; small corpora give fewer entries
ROW_TOKENS=${ROW_TOKENS:-4096} # examples are packed into rows of so many positions; longer responses are cut
ROWS_PER_STEP=${ROWS_PER_STEP:-48} # 48 rows of 4096 are the reference's step of size XL
TRAIN_ITERS=${TRAIN_ITERS:-10000}
LR=${LR:-2.2e-4}
WORKERS=${WORKERS:-$(nproc)} # processes that turn rows into token ids
PYTHON=${PYTHON:-} # of every step; default: that of .venv, else the one on PATH

set -euo pipefail
owned() { # flag, what to do instead
    echo "own_data.sh: ${1%%=*} is this script's: $2" >&2
    exit 1
}
exports=true stops_early=false
for argument in "$@"; do
    case ${argument%%=*} in
        --help | -h)
            sed -n '2,/^PYTHON=/p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --data-path) owned "$argument" "set DATA=... and OUT=... instead" ;;
        --tokenizer-model) owned "$argument" "set OUT=... instead, or name your own in a copy of this file" ;;
        --load | --save | --tensorboard-dir) owned "$argument" "set OUT=... instead" ;;
        --dry-run | --skip-train | --print-config) exports=false ;;
        --early-stopping) stops_early=true ;;
    esac
done
OUT=${OUT%/}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! [ -f "$root/tools/train_tokenizer.py" ]; then
    echo "own_data.sh: no tools/train_tokenizer.py in $root; keep copies of this file in examples/" >&2
    exit 1
fi
if [ -z "$DATA" ]; then
    echo "own_data.sh: set DATA to your file or folder; --help shows all settings" >&2
    exit 1
fi
if [ -z "$PYTHON" ]; then
    PYTHON=$root/.venv/bin/python
    if ! [ -x "$PYTHON" ]; then PYTHON=python; fi
fi
export PYTHON PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
finds='import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))'
if ! "$PYTHON" -c "$finds" megatron tokenizers torch 2>/dev/null; then
    echo "own_data.sh: PYTHON=$PYTHON does not find megatron, tokenizers and torch: run make setup, or set PYTHON" >&2
    exit 1
fi
read -ra keys <<<"$JSON_KEYS"
rows=(--input "$DATA" --json-keys "${keys[@]}" --row-shape "$ROW_SHAPE" --on-bad-row "$ON_BAD_ROW")
if [ -n "$SPLIT_SENTENCES" ]; then rows+=(--split-sentences --sentence-model "$OUT/sentences"); fi
if [ -n "$IGNORE_FIELDS" ]; then
    read -ra ignored <<<"$IGNORE_FIELDS"
    rows+=(--ignore-fields "${ignored[@]}")
fi
if [ "$DEFAULT_CONDITION" != refuse ]; then rows+=(--default-condition "$DEFAULT_CONDITION"); fi

# Every command runs beside this script, so that a signal which the script alone gets can be passed on.
running=
run() {
    "$@" <&0 &
    running=$!
    wait "$running"
    running=
}
stop() {
    trap '' INT TERM HUP
    if [ -n "$running" ]; then
        kill -TERM "$running" 2>/dev/null || true # it ignores INT, as all commands beside a script do
        wait "$running" || true
    fi
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

# 1. A tokenizer of your texts. With a tokenizer of HRM-Text at hand, leave this out and name its folder below.
run "$PYTHON" "$root/tools/train_tokenizer.py" "${rows[@]}" --output "$OUT/tokenizer" --vocab-size "$VOCAB_SIZE" \
    --keep-same

# 2. Token ids in shards of Megatron's .bin/.idx, and a report of them in $OUT/data.report.md. What is there is kept.
run "$PYTHON" "$root/tools/preprocess_data.py" "${rows[@]}" --output-prefix "$OUT/data" \
    --tokenizer-model "$OUT/tokenizer" --context-size "$ROW_TOKENS" --workers "$WORKERS"

# 3. Training on the GPUs of this node, or on the CPU where there is none. Three in a hundred examples are held out
#    (--split). The preset decides how many rows a GPU takes at a time (else give --micro-batch-size). Started again, it
#    goes on from its latest checkpoint. docs/flags.md has the flags; on GPUs add --bf16.
run "$root/launch_scripts/train_node.sh" \
    --data-path "$OUT/data" --tokenizer-model "$OUT/tokenizer" \
    --seq-length "$ROW_TOKENS" --global-batch-size "$ROWS_PER_STEP" \
    --train-iters "$TRAIN_ITERS" --lr "$LR" --lr-warmup-fraction 0.02 \
    --eval-interval 500 --eval-iters 10 \
    --load "$OUT/checkpoints" --save "$OUT/checkpoints" --save-interval 500 \
    --tensorboard-dir "$OUT/tensorboard" "$@"

if ! $exports; then exit 0; fi # nothing was trained

# 4. For transformers: the EMA of the weights, with the tokenizer beside them; of a run that --early-stopping judged the
#    best iteration, where it is still there, instead of the last.
model=(--load "$OUT/checkpoints" --tokenizer-model "$OUT/tokenizer")
record=$OUT/checkpoints/early_stopping.json
if $stops_early && [ -f "$record" ]; then
    best=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["best_iteration"] or "")' "$record")
    folder=$OUT/checkpoints/iter_$(printf %07d "$best")
    if [ -n "$best" ] && [ -d "$folder" ]; then model+=(--ckpt-step "$best"); fi
fi
run "$PYTHON" "$root/tools/convert_checkpoint.py" "${model[@]}" --load-format megatron \
    --save "$OUT/hf" --save-format hf --overwrite

echo "The model is in $OUT/hf. Ask it something:"
printf '  '
printf '%q ' "$PYTHON" "$root/tools/generate.py" "${model[@]}"
echo '--prompt "..."'
