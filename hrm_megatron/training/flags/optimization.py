"""Megatron's flags for the optimizer, its schedules and number formats."""
from __future__ import annotations

from hrm_megatron.training.flags.reasons import BY_INIT_SCHEME, IN_BF16, OTHER_LAYERS, OWN_WEIGHTS, TWO_BUFFERS
from hrm_megatron.training.flags.verdict import Group, Harmless, Refused, Used

ADAM_ATAN2 = "the optimizer is AdamATan2, which has no such setting"
ONE_DECAY = "the weight decay of a run is one number, as in HRM-Text"
FP32_STATE = "AdamATan2 keeps its state in fp32"

REGULARIZATION: Group = (
    Used("hrm_megatron.training.optimizer", "--weight-decay"),
    Used("megatron.core.optimizer.optimizer", "--clip-grad"),
    Used("megatron.core.optimizer", "--adam-beta1 --adam-beta2"),
    Refused("AdamATan2 divides by nothing that could be zero", "--adam-eps"),
    Refused("every weight of an HRM decays alike: its norms have none",
            "--apply-wd-to-qk-layernorm --no-weight-decay-cond-type"),
    Refused(ADAM_ATAN2, "--sgd-momentum --muon-momentum --muon-no-split-qkv --muon-nesterov --muon-scale-mode "
            "--muon-fp32-matmul-prec --muon-coefficient-type --muon-num-ns-steps --muon-tp-mode "
            "--muon-extra-scale-factor --muon-scalar-optimizer --lion-beta1 --lion-beta2"),
)
LEARNING_RATE: Group = (
    Used("hrm_megatron.training.step_schedules", "--lr --min-lr"),
    Used("hrm_megatron.optim.schedule", "--lr-warmup-iters --lr-warmup-fraction --lr-decay-iters"),
    Used("hrm_megatron.optim.schedule", "--lr-warmup-samples", needs="--train-samples"),
    Used("hrm_megatron.training.resume", "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
         needs="--load --pretrained-checkpoint"),
    Refused("only cosine is built", "--lr-decay-style",
            "leave it out; for a constant rate give --min-lr the value of --lr"),
    Refused("only cosine is built", "--lr-wsd-decay-style --lr-wsd-decay-iters --lr-wsd-decay-samples"),
    Refused("the decay is counted in steps", "--lr-decay-samples", "give --train-iters and --lr-decay-iters"),
    Refused("the warm-up begins at zero, as in HRM-Text", "--lr-warmup-init"),
    Refused(ONE_DECAY, "--start-weight-decay --end-weight-decay --weight-decay-incr-style", "give --weight-decay"),
    Refused("an old name", "--warmup", "give --lr-warmup-iters"),
    Refused("embedding and head have the rate of all weights, as in HRM-Text", "--decoupled-lr --decoupled-min-lr"),
    Refused("nothing would be trained", "--freeze-all-layers"),
)
RANDOM: Group = (
    Used("hrm_megatron.training.data", "--seed"),
    Refused("it is for CUDA graphs, which are not built", "--te-rng-tracker --inference-rng-tracker"),
    Refused(OWN_WEIGHTS, "--data-parallel-random-init --init-method-xavier-uniform",
            BY_INIT_SCHEME),
)
PRECISION: Group = (
    Used("megatron.training.arguments", "--grad-reduce-in-bf16", needs="--bf16"),
    Used("megatron.training.training", "--accumulate-allreduce-grads-in-fp32"),
    Used("megatron.core.optimizer", "--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window "
         "--hysteresis", needs="--fp16"),
    Used("megatron.core.distributed.param_and_grad_buffer", "--reuse-grad-buf-for-mxfp8-param-ag",
         needs="--fp8-param-gather"),
    Harmless("every kernel of an HRM's attention adds up in fp32", "--attention-softmax-in-fp32"),
    Refused("the loss of an HRM is computed in fp32", "--fp16-lm-cross-entropy"),
    Refused(OTHER_LAYERS, "--mamba-training-ssm-states-dtype"),
)
TRANSFORMER_ENGINE: Group = (
    Used("megatron.core.optimizer.distrib_optimizer", "--fp8-param-gather", needs="--fp8-format"),
    Refused(IN_BF16,
            "--fp4-param-gather"),
    Refused("one recipe holds for all layers", "--te-precision-config-file", "give --fp8-recipe"),
)
EXPERIMENTAL: Group = (
    Used("megatron.core.distributed.fsdp.mcore_fsdp_adapter",
         "--megatron-fsdp-main-params-dtype --megatron-fsdp-main-grads-dtype --megatron-fsdp-grad-comm-dtype "
         "--megatron-fsdp-enable-fine-grained-param-gather", needs="--use-megatron-fsdp"),
    Refused(TWO_BUFFERS,
            "--megatron-fsdp-max-pool-double-buffer --fsdp-db-use-persist-buf-on-alloc-fail"),
    Refused("no experimental part of Megatron is in an HRM", "--enable-experimental"),
    Refused("the layers of an HRM are its own", "--spec"),
    Refused(OTHER_LAYERS, "--hybrid-layer-pattern --hybrid-override-pattern"),
    Refused("a file of settings would pass by every check of the command line", "--yaml-cfg",
            "give its settings as flags"),
    Refused(f"not built for this model: {FP32_STATE}", "--use-precision-aware-optimizer --main-grads-dtype "
            "--main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype"),
)
