"""Norms of the last update and of the distance to the EMA, computed from the optimizer's state without a copy of the
weights."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from hrm_megatron.optim.adam_atan2 import AdamATan2, factors_of
from hrm_megatron.optim.sharded import parts_of

SLICE_ELEMENTS = 1 << 22  # processed at a time, to keep temporary tensors small
SIZES = ("update", "weights", "EMA distance")


@torch.no_grad()
def squares(optimizer: AdamATan2, tensor_parallel: Any = None) -> torch.Tensor:
    """Return sums of squares over the shards of this rank, fp64 [3]: of the last update, of the weights, and of the EMA
    minus the weights. Call it after `optimizer.step()` and before the next step begins.

    The update is recomputed from the moments, which the step has left in place: with
    angle = atan2(m, sqrt(v)/correction), p_new = keep * p_old - rate * angle. `tensor_parallel` is the group in which
    a replicated weight is counted by one rank only.
    """
    found: torch.Tensor | None = None
    for group in optimizer.param_groups:
        moved = optimizer.has_gradient(group)
        for p in group["params"]:
            if not p.numel() or not param_is_not_tensor_parallel_duplicate(p, tensor_parallel):
                continue
            state = optimizer.init_state(p)
            factors = factors_of(group) if moved and p.grad is not None else None
            flat = [t.detach().reshape(-1).split(SLICE_ELEMENTS)
                    for t in (p, state["exp_avg"], state["exp_avg_sq"], state["ema"])]
            for weight, m, v, ema in zip(*flat, strict=True):
                change = (weight.new_zeros(()) if factors is None else
                          _change(weight, m, v, direction=optimizer.direction, **factors))
                norms = change, torch.linalg.vector_norm(weight), torch.linalg.vector_norm(ema - weight)
                sums = torch.stack(norms).double().square()
                found = sums if found is None else found + sums
    return nothing() if found is None else found


def nothing() -> torch.Tensor:
    """Return the sums of squares of a rank without shards: zeros, fp64 [3]."""
    return torch.zeros(len(SIZES), dtype=torch.float64, device=f"cuda:{torch.cuda.current_device()}")


def _change(weight: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *, direction: Callable[..., torch.Tensor],
            keep: float, correction: float, rate: float, **_: float) -> torch.Tensor:
    """Return the norm of p_new - p_old."""
    step = direction(m, v, correction)
    return torch.linalg.vector_norm(weight.mul((keep - 1) / keep).sub_(step.mul_(rate / keep)))


def sizes(optimizer: Any, tensor_parallel: Any) -> dict[str, float]:
    """Return the norms named in SIZES over all ranks, for Megatron's optimizer; all ranks call it."""
    total: torch.Tensor | None = None
    for part in parts_of(optimizer):
        mine = nothing() if part.is_stub_optimizer else squares(part.optimizer, tensor_parallel)
        # The group over which the shards make up all weights; Megatron sums the gradient norm over it too.
        torch.distributed.all_reduce(mine, group=part.get_grad_stats_parallel_group())
        total = mine if total is None else total + mine
    assert total is not None
    return dict(zip(SIZES, total.sqrt().tolist(), strict=True))
