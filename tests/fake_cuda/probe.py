"""Whole steps of training on a device that computes nothing, with dynamo on; run as a program by test_steps.py.

    python -m tests.fake_cuda.probe CASE ...     what `train` finds for each, as JSON in the last line on stdout

A CASE is a JSON object of the arguments of `train`.
"""
from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch

from tests.fake_cuda.device import BACKWARDS, FORWARDS, pretend_cuda, ranks

pretend_cuda()

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer.optimizer_config import OptimizerConfig  # noqa: E402

from hrm_megatron.config import Architecture  # noqa: E402
from hrm_megatron.data.batch import PackedBatch, assemble_row  # noqa: E402
from hrm_megatron.model.hrm import HRMModel  # noqa: E402
from hrm_megatron.model.ticks import trains_embedding, unroll  # noqa: E402
from hrm_megatron.optim.builder import build_optimizer  # noqa: E402
from hrm_megatron.parallel.context import context_positions  # noqa: E402
from hrm_megatron.training.metrics import loss_sums  # noqa: E402
from hrm_megatron.training.overlap import (  # noqa: E402
    GradientCheck,
    OverlappedReduction,
    check_gradients_once,
    gather_before_compiled_layers,
)
from hrm_megatron.transformer_config import hrm_config  # noqa: E402

ARCHITECTURE = Architecture(2, 128, 2, 192, 250)
RANKS, ROW_TOKENS = 8, 112  # which is no size of a weight
BP_STEPS = (5, 5, 2)  # of each step, of two micro-batches
ROWS = [assemble_row([(range(1, 5 + i), range(1, 9 + i)) for i in range(examples)], ROW_TOKENS)
        for examples in (2, 4, 3)]
CHECK = GradientCheck()


def micro_batch(number: int, context: Any) -> PackedBatch:
    batch = PackedBatch.from_row(ROWS[number])
    if context.size() > 1:
        batch = batch.on_context_rank(context_positions(ROW_TOKENS, context.rank(), context.size()))
    return batch.to("cuda")


def train(overlap: bool = False, context_parallel: int = 1, tensor_parallel: int = 1,
          **settings: Any) -> dict[str, Any]:
    """A few steps. By step: the graphs compiled so far, the collectives that started in forward passes and in the last
    backward, the values that the host has read when gradients are finalized, and at its end. Of all: what made tensors
    that are like weights."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    FORWARDS.clear(), BACKWARDS.clear()
    found: dict[str, Any] = dict(graphs=[], gathered=[], reduced=[], reads=[])
    layout: dict[str, Any] = dict(context_parallel_size=context_parallel, tensor_model_parallel_size=tensor_parallel)
    with ranks(RANKS, **layout) as device:
        config = hrm_config(ARCHITECTURE, gradient_accumulation_fusion=True, calculate_per_token_loss=True, bf16=True,
                            params_dtype=torch.bfloat16, sequence_parallel=tensor_parallel > 1, **layout, **settings)
        model = HRMModel(config, 1).train()
        device.watched = {(weight.shape, weight.dtype) for name, weight in model.named_parameters() if "linear" in name}
        ddp = DistributedDataParallel(config, DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, check_for_nan_in_grad=True, bucket_size=50_000,
            overlap_grad_reduce=overlap, overlap_param_gather=overlap), model)
        reduction, now = OverlappedReduction(), dict(bp_steps=0)
        optimizer = build_optimizer(
            OptimizerConfig(optimizer="adam", lr=0.1, min_lr=0.1, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95,
                            clip_grad=0.0, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True,
                            overlap_param_gather=overlap),
            [ddp], 0.9, lambda: trains_embedding(unroll(2, 3, now["bp_steps"])))
        device.strict = True
        device.results.clear()
        for step, bp_steps in enumerate(BP_STEPS):
            now["bp_steps"] = bp_steps
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            untrained = None if trains_embedding(unroll(2, 3, bp_steps)) else model.embedding.word_embeddings.weight
            device.collectives.clear()
            for last in (False, True):
                with contextlib.nullcontext() if last else ddp.no_sync():
                    batch = micro_batch(step, model.pg_collection.cp)
                    reduction.before_forward(ddp, bp_steps, untrained)
                    loss, *_ = loss_sums(batch, ddp(batch=batch, bp_steps=bp_steps))
                    gathered = len(device.collectives)
                    loss.backward()
            found["gathered"].append(gathered)
            found["reduced"].append(len(device.collectives) - gathered)
            ddp.finish_grad_sync()
            found["reads"].append([device.reads])
            CHECK.read()
            assert optimizer.step()[0]
            found["reads"][-1].append(device.reads)
            device.reads = 0
            found["graphs"].append([len(FORWARDS), len(BACKWARDS)])
        return found | dict(groups=len(ddp.bucket_groups), results=device.results)


def main() -> None:
    check_gradients_once(CHECK)
    gather_before_compiled_layers()
    print(json.dumps({case: train(**json.loads(case)) for case in sys.argv[1:]}))


if __name__ == "__main__":
    main()
