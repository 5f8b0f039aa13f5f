"""Megatron's flags for checkpoints, data and tokenizer."""
from __future__ import annotations

from hrm_megatron.training.flags.reasons import NO_EXPERTS
from hrm_megatron.training.flags.verdict import Group, Harmless, Refused, Used

ONE_KIND = "checkpoints that a run goes on from are those of --save-interval"
CONVERTER = "use tools/convert_checkpoint.py"
EXAMPLES = "rows of an HRM are packed from examples, not cut from a stream of documents"
PREPROCESSING = "tokens come from the indexed dataset"
STORE = "leave it out; tools/preprocess_data.py --tokenizer-model decides"
OWN_STORES = "indexed datasets are read by readers of our own"
FSDP = "--use-megatron-fsdp"

CHECKPOINTING: Group = (
    Used("hrm_megatron.training.checkpoint", "--save --load --pretrained-checkpoint"),
    Used("hrm_megatron.training.checkpoint", "--ckpt-step --exit-on-missing-checkpoint",
         needs="--load --pretrained-checkpoint"),
    Used("hrm_megatron.training.finetune", "--finetune", needs="--pretrained-checkpoint --load"),
    Used("hrm_megatron.training.arguments", "--use-checkpoint-args", needs="--load --pretrained-checkpoint"),
    Used("megatron.training.training", "--save-interval --save-params-interval --save-wgrads-interval",
         needs="--save"),
    Used("megatron.training.training", "--save-activations-interval --save-dgrads-interval", needs="--save",
         package="transformer_engine"),
    Used("megatron.training.checkpointing", "--save-retain-interval --no-ckpt-fully-parallel-save "
         "--ckpt-fully-parallel-save-process-group --ckpt-assume-constant-structure --no-save-optim --no-save-rng",
         needs="--save"),
    Used("megatron.training.checkpointing", "--no-load-optim --no-load-rng "
         "--no-ckpt-load-validate-sharding-integrity --no-stream-ckpt-dequant",
         needs="--load --pretrained-checkpoint"),
    Used("megatron.training.checkpointing", "--dist-ckpt-strictness", needs="--load --pretrained-checkpoint",
         only=("assume_ok_unexpected", "log_unexpected", "log_all", "raise_unexpected", "ignore_all")),
    Used("megatron.training.checkpointing", "--ckpt-fully-parallel-load-process-group",
         needs="--load --pretrained-checkpoint"),
    Used("megatron.training.checkpointing", "--ckpt-fully-parallel-load-exchange-algo",
         needs="--load --pretrained-checkpoint", only=("broadcast", "gather_object")),
    Used("megatron.training.checkpointing", "--verify-integrity"),
    Used("megatron.training.checkpointing", "--no-strict-fsdp-dtensor-load", needs=FSDP),
    Used("megatron.training.checkpointing", "--async-save", needs="--use-persistent-ckpt-worker"),
    Used("megatron.training.async_utils", "--use-persistent-ckpt-worker", needs="--async-save"),
    Used("megatron.training.checkpointing", "--async-strategy --async-ckpt-cpu-priority --async-ckpt-io-priority "
         "--async-ckpt-use-cpu-shm --dist-ckpt-workers", needs="--async-save"),
    Harmless("checkpoints of a run are distributed ones, saved and loaded in parallel", "--use-dist-ckpt "
             "--ckpt-fully-parallel-save --ckpt-fully-parallel-load --auto-detect-ckpt-format"),
    Harmless("every weight's state is saved whole, by one of the ranks that share it, and gathered on no other",
             "--dist-ckpt-optim-fully-reshardable --distrib-optim-fully-reshardable-mem-efficient"),
    Harmless("the tokenizer is never taken from a checkpoint", "--no-use-tokenizer-model-from-checkpoint-args"),
    Refused("only torch_dist is built, and what --use-megatron-fsdp chooses by itself", "--ckpt-format "
            "--dist-ckpt-format", same=("torch_dist",)),
    Refused(NO_EXPERTS, "--save-tokens-per-expert-interval"),
    Refused("the EMA would not be loaded", "--load-main-params-from-ckpt",
            "give --load alone, or --no-load-optim"),
    Refused(ONE_KIND, "--non-persistent-save-interval --non-persistent-ckpt-type --non-persistent-global-ckpt-dir "
            "--non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo --replication --replication-jump "
            "--replication-factor", "leave it out; --save-retain-interval keeps fewer of them"),
    Refused("layouts differ freely between runs", "--use-mp-args-from-checkpoint-args",
            "give the layout of this run"),
    Refused("a run converts nothing", "--ckpt-convert-format --ckpt-convert-save "
            "--ckpt-convert-update-legacy-dist-opt-format", CONVERTER),
    Refused("it has no effect in this version", "--dist-ckpt-save-pre-mcore-014"),
    Refused("schedules and optimizer would stand at another step than the data", "--override-ckpt-iteration",
            "give --ckpt-step, or --finetune to begin at step 0"),
)
DATA: Group = (
    Used("hrm_megatron.training.data", "--data-path --train-data-path --valid-data-path --test-data-path "
         "--data-cache-path --seq-length"),
    Used("hrm_megatron.training.data", "--split", needs="--data-path"),
    Used("megatron.training.datasets.data_samplers", "--num-workers"),
    Harmless("an HRM's attention needs no mask from the loader", "--no-create-attention-mask-in-dataloader"),
    Refused(EXAMPLES, "--reset-position-ids --reset-attention-mask --dataloader-inter-document-masking "
            "--eod-mask-loss", "leave it out: positions, attention and loss restart in every example"),
    Refused(EXAMPLES, "--sample-rate --mask-prob --short-seq-prob --fim-data --fim-rate --fim-spm-rate "
            "--fim-split-sample --fim-fragment-rate --fim-no-prefix --fim-prefix-token --fim-middle-token "
            "--fim-suffix-token --fim-pad-token --fim-eod-token --allow-ambiguous-pad-tokens"),
    Refused("no file of paths is read", "--data-args-path --per-split-data-args-path",
            "write its weights and prefixes behind --data-path, or --train-data-path and --valid-data-path"),
    Refused(OWN_STORES, "--per-dataset-sequences-path"),
    Refused("a run has one length of rows", "--encoder-seq-length --decoder-seq-length", "give --seq-length"),
    Refused("a run goes through its data in one phase", "--phase-transition-iterations"),
    Refused("there are no made-up examples", "--mock-data", "give --data-path or --sampled-data-path"),
    Refused(OWN_STORES, "--dataloader-fast-cache-load --dataloader-defer-npy-index-mmap --no-mmap-bin-files "
            "--num-dataset-builder-threads --object-storage-cache-path --mid-level-dataset-surplus"),
)
TOKENIZER: Group = (
    Used("hrm_megatron.training.data", "--tokenizer-model"),
    Refused("the size of the vocabulary is that of the data, padded to a multiple of 256 as HRM-Text does",
            "--vocab-size --padded-vocab-size --no-pad-vocab-size --vocab-extra-ids"),
    Refused(PREPROCESSING, "--tokenizer-type", "leave it out; --tokenizer-model FOLDER says which made the dataset"),
    Refused(PREPROCESSING, "--vocab-file --merge-file --tokenizer-metadata --tokenizer-special-tokens "
            "--tiktoken-pattern --tiktoken-num-special-tokens --tokenizer-sentencepiece-legacy "
            "--no-tokenizer-sentencepiece-ignore-extra-whitespaces --tokenizer-hf-no-use-fast "
            "--tokenizer-hf-no-include-special-tokens --trust-remote-code --null-tokenizer-eod-id "
            "--null-tokenizer-pad-id --chat-template", STORE),
)
MSC: Group = (
    Harmless("it is off by itself", "--disable-msc"),
    Refused("data and checkpoints are read from file systems only", "--enable-msc"),
)
