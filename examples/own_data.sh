#!/usr/bin/env bash
# From your own questions and answers to a trained and exported model.
#   DATA=my.jsonl OUT=runs/mine examples/own_data.sh [flags of hrm_megatron.pretrain, such as --bf16]
# Set these in the environment, or edit them in a copy of this file beside it. Paths are relative to where you stand.
# Started again it goes on where it stopped; other data or other settings of the data need another OUT.

# Rows like {"condition": "direct", "instruction": "What is 2 + 3?", "response": "5"}, chats or alpaca rows: a file, a glob
# in quotes, or a folder. They may be jsonl, plain or in .gz or .zst, Parquet, Arrow or a dataset saved to disk: see
# docs/data.md. The condition is a comma-separated list of direct, cot, noisy, synth, or empty.
DATA=${DATA:-}
OUT=${OUT:-runs/own_data}
JSON_KEYS=${JSON_KEYS:-condition instruction response} # the names of these fields in your rows
ROW_SHAPE=${ROW_SHAPE:-auto} # or fields, messages, alpaca: what the rows are, told from the first
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
PYTHON=${PYTHON:-} # default: that of .venv

set -euo pipefail
for argument in "$@"; do
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
        sed -n '2,/^PYTHON=/p' "${BASH_SOURCE[0]}"
        exit 0
    fi
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! [ -f "$root/tools/train_tokenizer.py" ]; then
    echo "own_data.sh: no tools/train_tokenizer.py in $root; keep copies of this file in examples/" >&2
    exit 1
fi
if [ -z "$DATA" ]; then
    echo "own_data.sh: set DATA to your file or folder; --help shows all settings" >&2
    exit 1
fi
PYTHON=${PYTHON:-$root/.venv/bin/python}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
read -ra keys <<<"$JSON_KEYS"
rows=(--input "$DATA" --json-keys "${keys[@]}" --row-shape "$ROW_SHAPE" --on-bad-row "$ON_BAD_ROW")
if [ -n "$SPLIT_SENTENCES" ]; then rows+=(--split-sentences --sentence-model "$OUT/sentences"); fi
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

# 4. For transformers: the EMA of the weights, with the tokenizer beside them.
run "$PYTHON" "$root/tools/convert_checkpoint.py" --load "$OUT/checkpoints" --load-format megatron \
    --save "$OUT/hf" --save-format hf --tokenizer-model "$OUT/tokenizer" --overwrite

echo "The model is in $OUT/hf. Ask it something:"
printf '  %q %q --load %q --tokenizer-model %q --prompt "..."\n' "$PYTHON" "$root/tools/generate.py" "$OUT/checkpoints" \
    "$OUT/tokenizer"
