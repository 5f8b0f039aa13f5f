#!/usr/bin/env bash
# From your own questions and answers to a trained and exported model. Copy this file and edit the settings,
# or set them in the environment:  DATA=my.jsonl OUT=runs/mine examples/own_data.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# Rows like {"condition": "direct", "instruction": "What is 2 + 3?", "response": "5"}. The condition is a
# comma-separated list of direct, cot, noisy, synth, or empty; other field names: see --json-keys below.
# A file, a glob in quotes, or a folder of *.jsonl.
DATA=${DATA:?set DATA to your jsonl file}
OUT=${OUT:-runs/own_data}
export PRESET=${PRESET:-B}            # B, L, XL, XXL or XXL_wide: see hrm_megatron/config.py
VOCAB_SIZE=${VOCAB_SIZE:-65536} # at most; small corpora give fewer entries
ROW_TOKENS=${ROW_TOKENS:-4096} # examples are packed into rows of so many positions; the longest must fit
ROWS_PER_STEP=${ROWS_PER_STEP:-48} # 48 rows of 4096 are the reference's step of size XL
TRAIN_ITERS=${TRAIN_ITERS:-10000}
LR=${LR:-2.2e-4}
PYTHON=${PYTHON:-.venv/bin/python}

# 1. A tokenizer of your texts. With a tokenizer of HRM-Text at hand, leave this out and name its folder below.
[ -e "$OUT/tokenizer" ] || "$PYTHON" tools/train_tokenizer.py \
    --input "$DATA" --output "$OUT/tokenizer" --vocab-size "$VOCAB_SIZE"

# 2. Token ids in Megatron's .bin/.idx. --on-bad-row skip would count and leave out rows that cannot be read;
#    --json-keys tags question answer would take these fields instead.
[ -e "$OUT/data.idx" ] || "$PYTHON" tools/preprocess_data.py \
    --input "$DATA" --output-prefix "$OUT/data" --tokenizer-model "$OUT/tokenizer" \
    --context-size "$ROW_TOKENS" --workers "$(nproc)"

# 3. Training on the GPUs of this node, or on the CPU where there is none. Three in a hundred examples are held out
#    (--split). Started again, it goes on from its latest checkpoint. docs/flags.md has the flags; on GPUs add --bf16.
launch_scripts/train_node.sh \
    --data-path "$OUT/data" --tokenizer-model "$OUT/tokenizer" \
    --seq-length "$ROW_TOKENS" --micro-batch-size 1 --global-batch-size "$ROWS_PER_STEP" \
    --train-iters "$TRAIN_ITERS" --lr "$LR" --lr-warmup-fraction 0.02 \
    --eval-interval 500 --eval-iters 10 \
    --load "$OUT/checkpoints" --save "$OUT/checkpoints" --save-interval 500 \
    --tensorboard-dir "$OUT/tensorboard" "$@"

# 4. For transformers: the average of the weights (EMA), with the tokenizer beside them.
"$PYTHON" tools/convert_checkpoint.py --load "$OUT/checkpoints" --load-format megatron \
    --save "$OUT/hf" --save-format hf --tokenizer-model "$OUT/tokenizer" --overwrite

echo "The model is in $OUT/hf. Ask it something:"
echo "  $PYTHON tools/generate.py --load $OUT/checkpoints --tokenizer-model $OUT/tokenizer --prompt '...'"
