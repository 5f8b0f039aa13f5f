"""Megatron's flags for the course of a run: steps, batches, validation, logs, profiles and faults."""
from __future__ import annotations

from hrm_megatron.training.flags.reasons import NO_EXPERTS, UNTESTED
from hrm_megatron.training.flags.verdict import Group, Harmless, Refused, Used

ONE_SIZE = "not built: learning rate and gradient ticks are counted in steps of one size"
OWN_SWIGLU = "an HRM has a SwiGLU of its own where Megatron's fused one does not run"
ADAM = "not built for this model: it would train by Adam; data parallel ranks share the state already"
ONE_FIGURE = "the sets of --valid-data-path are evaluated as one"
OWN_RESTART = "our start does not restart ranks in a process"
NO_LOGITS = "not built: an HRM learns from labels alone"
FAULTS = "--fault-injector-ranks --fault-injector-num-ranks"

PROFILING: Group = (
    Used("megatron.training.training", "--profile"),
    Used("megatron.training.training", "--profile-step-start --profile-step-end --profile-ranks", needs="--profile"),
    # Traces are written beside the TensorBoard folder.
    Used("megatron.training.training", "--use-pytorch-profiler", needs="--profile, --tensorboard-dir"),
    Used("megatron.training.training", "--pytorch-profiler-collect-shapes --pytorch-profiler-collect-callstack "
         "--pytorch-profiler-collect-chakra", needs="--use-pytorch-profiler"),
    Used("megatron.training.training", "--record-shapes --nvtx-ranges", needs="--profile", cuda=True),
    Used("megatron.training.training", "--record-memory-history", cuda=True),
    Used("megatron.training.training", "--memory-snapshot-path", needs="--record-memory-history"),
)
TRAINING: Group = (
    Used("hrm_megatron.training.arguments", "--micro-batch-size --global-batch-size --train-iters --train-samples"),
    Used("hrm_megatron.training.memory", "--recompute-activations"),
    Used("megatron.training.training", "--empty-unused-memory-level --check-weight-hash-across-dp-replicas-interval "
         "--train-sync-interval --exit-interval --exit-duration-in-mins --exit-signal-handler --manual-gc "
         "--iterations-to-skip --no-check-for-nan-in-loss-and-grad --check-for-large-grads "
         "--dump-param-to-param-group-map"),
    Used("megatron.training.training", "--gpu-sniff-test-interval", cuda=True),
    Used("megatron.training.global_vars", "--exit-signal", needs="--exit-signal-handler",
         only=("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")),
    Used("megatron.training.training", "--manual-gc-interval --no-manual-gc-eval", needs="--manual-gc"),
    Used("megatron.training.arguments", "--result-rejected-tracker-filename"),
    Used("megatron.core.tensor_parallel.layers", "--no-gradient-accumulation-fusion"),
    Harmless("attention is fused by --attention-kernel", "--use-flash-attn --no-masked-softmax-fusion"),
    Harmless("no part of an HRM has this fusion of Megatron's", "--no-bias-gelu-fusion --no-bias-dropout-fusion "
             "--no-rope-fusion --no-persist-layer-norm"),
    Harmless(OWN_SWIGLU, "--no-bias-swiglu-fusion"),
    Harmless("no other models are left in Megatron", "--use-mcore-models"),
    Refused(ONE_SIZE, "--rampup-batch-size --step-batch-size-schedule", "leave it out, and give --global-batch-size"),
    Refused(ONE_SIZE, "--decrease-batch-size-if-needed",
            "give a --global-batch-size that is a multiple of --micro-batch-size x replicas"),
    Refused("an old name", "--batch-size", "give --micro-batch-size"),
    Refused("an old name", "--checkpoint-activations", "give --recompute-activations or --recompute-ticks"),
    Refused("it has no effect in this version", "--exit-signal-handler-for-dataloader", "give --exit-signal-handler"),
    Refused("it ends a run without a save, with exit code 0", "--exit-signal-handler-for-training",
            "give --exit-signal-handler"),
    Refused(UNTESTED, "--tp-comm-overlap-cfg"),
    Refused("positions of an HRM are plain rotary ones", "--rope-type", same=("rope",)),
    Refused("an HRM trains by AdamATan2", "--optimizer"),
    Refused(ADAM, "--optimizer-cpu-offload --optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload "
            "--overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads --no-pin-cpu-params"),
    Refused("not built: the count of a step and its rate change from step to step", "--optimizer-cuda-graph"),
    Refused("the order of the rows is that of their plan, by the seed", "--dataloader-type", same=("single",)),
)
VALIDATION: Group = (
    Used("megatron.training.training", "--eval-iters --eval-interval --start-eval-at-iter --eval-global-batch-size "
         "--eval-micro-batch-size --skip-train --full-validation"),
    Refused("it checks norms of queries and keys, which an HRM does not have", "--test-mode"),
    Refused(ONE_FIGURE, "--multiple-validation-sets --validation-set-names",
            "leave it out: --skip-train evaluates each by itself"),
)
LOGGING: Group = (
    Used("megatron.training.training", "--log-interval --log-params-norm --log-throughput "
         "--timing-log-level --log-num-zeros-in-grad --no-barrier-with-level-1-timing"),
    Used("megatron.training.global_vars", "--timing-log-option", needs="--timing-log-level"),
    Used("megatron.training.training", "--log-progress", needs="--save"),
    Used("megatron.training.global_vars", "--tensorboard-dir"),
    Used("megatron.training.global_vars", "--tensorboard-queue-size", needs="--tensorboard-dir"),
    Used("megatron.training.training", "--tensorboard-log-interval --log-timers-to-tensorboard "
         "--no-log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard --log-memory-to-tensorboard "
         "--log-world-size-to-tensorboard", needs="--tensorboard-dir"),
    Used("megatron.training.training", "--log-memory-interval"),
    Used("megatron.training.utils.common_utils", "--log-device-memory-used", cuda=True),
    Used("megatron.training.global_vars", "--wandb-project", package="wandb"),
    Used("megatron.training.global_vars", "--wandb-exp-name --wandb-save-dir --wandb-entity",
         needs="--wandb-project"),
    Used("megatron.training.initialize", "--logging-level"),
    Used("megatron.training.training", "--log-energy", package="pynvml", cuda=True),
    Refused("the scores of an HRM's attention never exist at once", "--log-max-attention-logit"),
    Refused(NO_EXPERTS, "--moe-routing-trace-path --moe-routing-trace-max-training-iters "
            "--moe-routing-trace-capture-logits --moe-routing-trace-capture-hidden-states "
            "--moe-routing-trace-dump-weights"),
)
STRAGGLER: Group = (
    Refused("the forward steps of Megatron's examples start its timer, and ours does not",
            "--log-straggler --straggler-ctrlr-port --straggler-minmax-count --disable-straggler-on-startup",
            "leave it out: --timing-log-level 2 --timing-log-option all prints the times of each rank"),
)
WORKLOAD_INSPECTOR: Group = (
    Used("megatron.training.training", "--run-workload-inspector-server", package="workload_inspector"),
)
DISTILLATION: Group = (
    Refused(NO_LOGITS, "--logits-save-top-k --logits-save-top-p --logits-save-top-p-min-k --logits-save-dir "
            "--logits-save-dtype --logits-load-dir --logits-load-decode-threads --logits-load-prefetch-factor "
            "--logits-load-msc-prefetch-depth --logits-load-kd-loss-alpha --logits-load-ignore-errors"),
)
ONE_LOGGER: Group = (
    Used("megatron.training.global_vars", "--no-one-logger"),
    Used("megatron.training.global_vars", "--one-logger-project --one-logger-run-name --one-logger-async",
         package="one_logger"),
    Used("megatron.training.one_logger_utils", "--app-tag-run-name --app-tag-run-version", package="one_logger"),
)
IN_PROCESS_RESTART: Group = (
    Refused(OWN_RESTART, "--inprocess-restart --inprocess-max-iterations --inprocess-monitor-thread-interval "
            "--inprocess-monitor-process-interval --inprocess-progress-watchdog-interval "
            "--inprocess-heartbeat-interval --inprocess-soft-timeout --inprocess-hard-timeout "
            "--inprocess-heartbeat-timeout --inprocess-barrier-timeout --inprocess-completion-timeout "
            "--inprocess-last-call-wait --inprocess-termination-grace-time --inprocess-granularity "
            "--inprocess-active-world-size --inprocess-empty-cuda-cache",
            "leave it out: torchrun --max-restarts starts all ranks again"),
)
FT_PACKAGE: Group = (
    Used("megatron.training.ft_integration", "--enable-ft-package", package="nvidia_resiliency_ext"),
    Used("megatron.training.ft_integration", "--calc-ft-timeouts --ft-num-warmup-iters", needs="--enable-ft-package"),
)
RERUN: Group = (
    Used("megatron.training.initialize", "--rerun-mode", only=("disabled", "validate_results")),  # as its code knows
    Used("megatron.training.initialize", "--error-injection-rate"),
    Used("megatron.training.initialize", "--error-injection-type", needs="--error-injection-rate"),
    Refused("the loss functions of Megatron's examples read it, and ours does not", "--check-for-spiky-loss"),
)
AUTORESUME: Group = (
    Refused("it ends a run in silence outside of NVIDIA's own cluster",
            "--adlr-autoresume --adlr-autoresume-interval", "give --exit-signal-handler or --exit-duration-in-mins"),
)
FAULT_INJECTOR: Group = (
    Used("megatron.training.training", FAULTS, package="nvidia_resiliency_ext", cuda=True),
    Used("megatron.core.fault_injector", "--fault-injector-fault-types --fault-injector-fault-probabilities "
         "--fault-injector-fault-delay --fault-injector-delay-start-iteration --fault-injector-mtti-seconds "
         "--fault-injector-offset-seconds --fault-injector-seed", needs=FAULTS),
)
