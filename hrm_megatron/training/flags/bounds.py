"""Smallest and largest value of each used flag that takes a number; None if any number is valid."""
from __future__ import annotations

from collections.abc import Iterable

Bounds = tuple[float, float]
ANY_LARGER = float("inf")
BELOW = ("--adam-beta1", "--adam-beta2")  # excluding the largest value: AdamATan2 divides by 1 - beta^t


def _at_least(least: float, flags: str) -> Iterable[tuple[str, Bounds]]:
    return ((flag, (least, ANY_LARGER)) for flag in flags.split())


BOUNDS: dict[str, Bounds | None] = {
    **dict(_at_least(1, (
        "--num-layers --hidden-size --num-attention-heads --ffn-hidden-size --tensor-model-parallel-size "
        "--pipeline-model-parallel-size --context-parallel-size --recompute-num-layers --fp8-amax-history-len "
        "--mlp-chunks-for-training --rotary-base --micro-batch-size --global-batch-size --train-iters --train-samples "
        "--exit-interval --exit-duration-in-mins --eval-interval --eval-global-batch-size --eval-micro-batch-size "
        "--log-interval --log-memory-interval --tensorboard-log-interval --tensorboard-queue-size --save-interval "
        "--save-params-interval --save-wgrads-interval --save-activations-interval --save-dgrads-interval "
        "--save-retain-interval --check-weight-hash-across-dp-replicas-"
        "interval --gpu-sniff-test-interval --train-sync-interval --ckpt-step --dist-ckpt-workers --seq-length "
        "--distributed-timeout-minutes --distributed-timeout-seconds-after-init --ddp-num-buckets --ddp-bucket-size "
        "--suggested-communication-unit-size --flight-recorder-trace-buffer-size "
        "--lr-decay-iters --loss-scale-window --hysteresis --fault-injector-num-ranks"))),
    **dict(_at_least(0, (
        "--norm-epsilon --lr --min-lr --lr-warmup-iters --lr-warmup-samples --weight-decay --clip-grad "
        "--eval-iters --start-eval-at-iter --num-workers --cpu-offloading-num-layers --num-layers-at-start-in-bf16 "
        "--num-layers-at-end-in-bf16 --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers "
        "--profile-step-start --profile-step-end --profile-ranks --manual-gc-interval --empty-unused-memory-level "
        "--timing-log-level --loss-scale --initial-loss-scale --min-loss-scale --error-injection-rate "
        "--ft-num-warmup-iters --fault-injector-fault-delay --fault-injector-delay-start-iteration "
        "--fault-injector-mtti-seconds --fault-injector-offset-seconds --fp8-margin --logging-level"))),
    **dict(_at_least(1, "--iterations-to-skip --rollback-after")),
    "--seed": (1, 2**31 - 1),  # numpy accepts seeds below 2^32, and Megatron adds 100 for each pipeline stage
    "--adam-beta1": (0, 1), "--adam-beta2": (0, 1), "--lr-warmup-fraction": (0, 1),
    "--async-ckpt-cpu-priority": (0, 19), "--async-ckpt-io-priority": (0, 3),
    "--fault-injector-seed": None,
    "--ema-decay": (0, 1), "--init-std": (0, ANY_LARGER), "--pipeline-window": (1, ANY_LARGER),  # ours
    "--hang-timeout-minutes": (0.1, ANY_LARGER),
    **dict(_at_least(1, "--epochs --early-stopping --eval-tasks-limit --eval-tasks-new-tokens --most-recent-k")),
}
