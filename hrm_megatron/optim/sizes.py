"""How far the last step went and how far the EMA lags, read off the optimizer's state: no copy of the weights."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from hrm_megatron.optim.adam_atan2 import AdamATan2, factors_of
from hrm_megatron.optim.sharded import parts_of

SLICE_ELEMENTS = 1 << 22  # at a time, so that temporary tensors stay small
SIZES = ("update", "weights", "EMA distance")


@torch.no_grad()
def squares(optimizer: AdamATan2, tensor_parallel: Any = None) -> torch.Tensor:
    """Sums of squares over the shards of this rank, fp64 [3]: of the last change of the weights, of the weights, and of
    the EMA less the weights. Call it behind `optimizer.step()`, while its step is still the running one.

    The change follows from the moments, which hold what the step has left: with angle = atan2(m, sqrt(v)/correction),
    p_new = keep * p_old - rate * angle. `tensor_parallel` is the group of which one rank counts what all of them hold.
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
    """Sums of squares where this rank has no shard."""
    return torch.zeros(len(SIZES), dtype=torch.float64, device=f"cuda:{torch.cuda.current_device()}")


def _change(weight: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *, direction: Callable[..., torch.Tensor],
            keep: float, correction: float, rate: float, **_: float) -> torch.Tensor:
    """Norm of p_new - p_old."""
    step = direction(m, v, correction)
    return torch.linalg.vector_norm(weight.mul((keep - 1) / keep).sub_(step.mul_(rate / keep)))


def sizes(optimizer: Any, tensor_parallel: Any) -> dict[str, float]:
    """Norms over all ranks, by SIZES, of Megatron's optimizer around one AdamATan2 or several; all ranks call it."""
    total: torch.Tensor | None = None
    for part in parts_of(optimizer):
        mine = nothing() if part.is_stub_optimizer else squares(part.optimizer, tensor_parallel)
        # The ranks whose shards, put together, are all the weights: it is over these that Megatron sums gradients too.
        torch.distributed.all_reduce(mine, group=part.get_grad_stats_parallel_group())
        total = mine if total is None else total + mine
    assert total is not None
    return dict(zip(SIZES, total.sqrt().tolist(), strict=True))
