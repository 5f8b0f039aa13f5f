"""Megatron's flags for parallelism and communication."""
from __future__ import annotations

from hrm_megatron.training.flags.reasons import FIRST_AND_LAST, OWN_CONTEXT, TICKS_ARE_CHUNKS, TWO_BUFFERS
from hrm_megatron.training.flags.verdict import Group, Harmless, Refused, Used

FSDP = "--use-megatron-fsdp"

DISTRIBUTED: Group = (
    Used("megatron.training.initialize", "--distributed-backend --distributed-timeout-minutes "
         "--nccl-communicator-config-path --use-tp-pp-dp-mapping --disable-gloo-process-groups "
         "--high-priority-stream-groups --flight-recorder-dump-path"),
    Used("megatron.training.initialize", "--use-sharp", cuda=True),
    Used("megatron.training.initialize", "--sharp-enabled-group", needs="--use-sharp"),
    Used("megatron.training.initialize", "--flight-recorder-trace-buffer-size --no-flight-recorder-dump-on-timeout "
         "--flight-recorder-include-stack-trace --no-flight-recorder-include-only-active "
         "--no-flight-recorder-extra-dump-on-exec", needs="--flight-recorder-dump-path"),
    Used("megatron.training.training", "--distributed-timeout-seconds-after-init --no-align-grad-reduce "
         "--use-distributed-optimizer --create-all-gather-group"),
    Used("megatron.training.global_vars", "--disable-jit-fuser"),
    Used("hrm_megatron.training.fsdp", "--use-megatron-fsdp --use-torch-fsdp2"),
    Used("hrm_megatron.training.layout",
         "--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers"),
    Used("megatron.core.pipeline_parallel.schedules", "--no-overlap-p2p-communication",
         needs="--pipeline-model-parallel-size"),
    Used("megatron.core.distributed.distributed_data_parallel", "--overlap-grad-reduce"),
    Used("megatron.training.training", "--ddp-num-buckets --ddp-bucket-size", needs="--overlap-grad-reduce"),
    Used("megatron.training.training", "--ddp-pad-buckets-for-high-nccl-busbw "
         "--ddp-reduce-scatter-with-fp32-accumulation"),
    Used("megatron.training.training", "--ddp-param-name-patterns-for-fp32-local-accumulation",
         needs="--grad-reduce-in-bf16"),
    Used("megatron.core.distributed.distributed_data_parallel", "--overlap-param-gather --no-align-param-gather",
         needs="--overlap-grad-reduce"),
    Used("hrm_megatron.training.fsdp", "--data-parallel-sharding-strategy", needs=FSDP),
    Used("megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer",
         "--no-gradient-reduce-div-fusion --keep-fp8-transpose-cache", needs=FSDP),
    Used("megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp", "--suggested-communication-unit-size",
         needs=FSDP),
    Used("megatron.training.training", "--torch-fsdp2-no-reshard-after-forward", needs="--use-torch-fsdp2"),
    Harmless("torchrun says it in the environment", "--local-rank"),
    Refused("a run sets up all of Megatron by itself", "--lazy-mpu-init"),
    Refused("its ranks would train without each other", "--fake-process-group"),
    Refused("losses of an HRM are per token: gradients are sums", "--ddp-average-in-collective"),
    Refused("AdamATan2 steps once all gradients are there", "--overlap-param-gather-with-optimizer-step"),
    Refused(TWO_BUFFERS, "--fsdp-double-buffer "
            "--use-nccl-ub --fsdp-manual-registration --disable-symmetric-registration"),
    Refused("it belongs to optimizers of whole layers", "--no-use-layer-wise-param-layout"),
    Refused("not built: all data parallel ranks share one state", "--num-distributed-optimizer-instances "
            "--outer-dp-sharding-strategy --enable-full-sharding-in-hsdp"),
    Refused(OWN_CONTEXT, "--cp-comm-type"),
    Refused("an old name", "--model-parallel-size", "give --tensor-model-parallel-size"),
    Refused(TICKS_ARE_CHUNKS, "--pipeline-model-parallel-layout --num-layers-per-virtual-pipeline-stage "
            "--num-virtual-stages-per-pipeline-rank", FIRST_AND_LAST),
)
