"""AdamATan2 with an EMA of the weights, as a plain torch optimizer."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from hrm_megatron.optim.flat import FlatState, Shard, joined, starts_of

STATE_KEYS = ("exp_avg", "exp_avg_sq", "ema")
# Key of the update count in a param group. Not "step": Megatron requires that to be equal in all groups
# (distrib_optimizer.py, state_dict), but the embedding is not updated while few ticks build a graph.
UPDATES = "updates"
ADAM_EPSILON = 1e-8


def state_prefix(state: str) -> str:
    """Return the prefix of the checkpoint keys of `state`, which is one of STATE_KEYS or "param" (the master).
    Source: Megatron-Core, dist_checkpointing/optimizer.py."""
    return f"optimizer.state.{state}"


def state_key(state: str, weight: str) -> str:
    """Return the checkpoint key of `state` of a weight."""
    return f"{state_prefix(state)}.{weight}"


def atan2_of(m: torch.Tensor, v: torch.Tensor, correction: float) -> torch.Tensor:
    """Return the update direction of AdamATan2."""
    return torch.atan2(m, v.sqrt().div_(correction))


def quotient_of(m: torch.Tensor, v: torch.Tensor, correction: float) -> torch.Tensor:
    """Return the update direction of AdamW (Loshchilov and Hutter, arXiv 1711.05101; torch.optim.AdamW)."""
    return m / v.sqrt().div_(correction).add_(ADAM_EPSILON)


def update(p: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, ema: torch.Tensor, *, keep: float,
           b1: float, b2: float, correction: float, rate: float, ema_decay: float,
           direction: Callable[..., torch.Tensor] = atan2_of) -> None:
    """Update one tensor and its state in place, see `AdamATan2`.

    The values that change every step are `keep` = 1 - lr*wd, `correction` = sqrt(1-b2^t) and `rate` = lr/(1-b1^t): the
    compiled function must not specialize on them.
    """
    g = grad.to(m.dtype)
    p.mul_(keep)
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    step = direction(m, v, correction)
    if torch.compiler.is_compiling():  # dynamo treats `alpha` as a constant and would recompile every step
        p.sub_(step.mul_(rate))
    else:
        p.add_(step, alpha=-rate)
    ema.lerp_(p, 1 - ema_decay)


def factors_of(group: dict[str, Any]) -> dict[str, float]:
    """Return the keyword arguments of `update` for the last step that the group counted."""
    t, lr, (b1, b2) = group[UPDATES], group["lr"], group["betas"]
    return dict(keep=1 - lr * group["weight_decay"], b1=b1, b2=b2, correction=math.sqrt(1 - b2 ** t),
                rate=lr / (1 - b1 ** t), ema_decay=group["ema_decay"])


def fused_update() -> Callable[..., None]:
    """Return `update` as one compiled kernel that reads and writes each tensor once.

    One compilation serves all sizes and steps. Pass parameters detached: dynamo treats the sizes of an nn.Parameter as
    constants. No two tensors of a call may share a storage: the compiler would have to assume that they overlap.
    """
    return torch.compile(update, dynamic=True)


class AdamATan2(torch.optim.Optimizer):
    """Adam with atan2 in place of the division (Everett et al., arXiv 2407.05872), decoupled decay, weight EMA.

    Per parameter with a gradient, t counting its group's updates:
    `p *= 1 - lr*wd; m = lerp(m, g, 1-b1); v = b2*v + (1-b2)*g*g;
    p -= lr/(1-b1^t) * atan2(m, sqrt(v)/sqrt(1-b2^t)); ema = lerp(ema, p, 1-ema_decay)`.
    There is no epsilon: atan2(0, 0) = 0. A group for which `has_gradient` returns False is skipped entirely: no
    decay, no count, no EMA. A parameter whose `grad` is None is skipped too, but its group still counts the update.
    `direction` replaces the atan2 (ablation `--adamw`); everything else stays the same.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95),
                 weight_decay: float = 0.1, ema_decay: float = 0.9999,
                 has_gradient: Callable[[dict[str, Any]], bool] = lambda group: True,
                 direction: Callable[..., torch.Tensor] = atan2_of) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, ema_decay=ema_decay))
        self.has_gradient, self.direction = has_gradient, direction
        self.places: dict[torch.Tensor, tuple[FlatState, int]] = {}
        self.update = fused_update() if torch.cuda.is_available() else update  # on a CPU there may be no compiler
        for group in self.param_groups:
            group.setdefault(UPDATES, 0)

    def lay_out(self, params: Sequence[torch.Tensor], shards: Sequence[Shard], movable: bool) -> None:
        """Keep the state of these parameters of one group in flat buffers, so that one call updates many of them.

        If `movable`, the masters are moved into a flat buffer too. Otherwise they stay in their owner's buffers, and
        one call covers those that are adjacent there. Without this call (DTensors) each parameter is updated by itself.
        """
        starts, size = starts_of(shards)
        flat = FlatState(size)
        masters = params[0].new_zeros(size, requires_grad=False) if movable and params else None
        for p, start in zip(params, starts, strict=True):
            self.places[p] = flat, start
            if masters is not None:
                p.data = masters[start:start + p.numel()].copy_(p.data)

    def init_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of `p`, created if there is none; raise KeyError if a loaded state lacks a tensor."""
        state = self.state[p]
        if not state:
            state.update(exp_avg=torch.zeros_like(p.data), exp_avg_sq=torch.zeros_like(p.data), ema=p.data.clone())
        missing = [key for key in STATE_KEYS if key not in state]
        if missing:
            raise KeyError(f"optimizer state without {', '.join(missing)}: the checkpoint was not written by AdamATan2")
        if p in self.places:  # on every call: loading a checkpoint may have replaced the tensors
            flat, start = self.places[p]
            flat.take(state, start)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            # Even without gradients: ranks must agree on which states exist when they save.
            states = [self.init_state(p) for p in group["params"]]
            if not self.has_gradient(group):
                continue
            group[UPDATES] += 1
            factors = factors_of(group)
            rows = [(p.detach(), *(state[key] for key in STATE_KEYS), p.grad) if p.grad is not None and p.numel()
                    else None for p, state in zip(group["params"], states, strict=True)]
            for p, m, v, ema, grad in joined(rows) if self.places else filter(None, rows):
                self.update(p, grad, m, v, ema, direction=self.direction, **factors)


def init_states(optimizer: AdamATan2, config: Any = None) -> None:
    """Create the state of all parameters (Megatron's `init_state_fn`)."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.init_state(p)
