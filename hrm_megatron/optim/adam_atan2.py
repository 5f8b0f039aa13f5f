"""AdamATan2 with a running average of the weights, as a plain torch optimizer."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

STATE_KEYS = ("exp_avg", "exp_avg_sq", "ema")
# The number of updates lives in the param group under our own word: "step" there must be one number for all
# groups (distrib_optimizer.py, state_dict), while the embedding's lags behind while few ticks build a graph.
UPDATES = "updates"


class AdamATan2(torch.optim.Optimizer):
    """Adam with atan2 in place of the division (Everett et al., arXiv 2407.05872), decoupled decay, weight EMA.

    Per parameter with a gradient, t counting its group's updates:
    `p *= 1 - lr*wd; m = lerp(m, g, 1-b1); v = b2*v + (1-b2)*g*g;
    p -= lr/(1-b1^t) * atan2(m, sqrt(v)/sqrt(1-b2^t)); ema = lerp(ema, p, 1-ema_decay)`.
    There is no epsilon: atan2(0, 0) = 0. A group for which `has_gradient` answers False is skipped whole: no
    decay, no count, no average. A parameter whose `grad` is None is skipped likewise, but counts with its group.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95),
                 weight_decay: float = 0.1, ema_decay: float = 0.9999,
                 has_gradient: Callable[[dict[str, Any]], bool] = lambda group: True) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, ema_decay=ema_decay))
        self.has_gradient = has_gradient
        for group in self.param_groups:
            group.setdefault(UPDATES, 0)

    def init_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of `p`, made if there is none; refuse one that lost a part on its way."""
        state = self.state[p]
        if not state:
            state.update(exp_avg=torch.zeros_like(p.data), exp_avg_sq=torch.zeros_like(p.data), ema=p.data.clone())
        missing = [key for key in STATE_KEYS if key not in state]
        if missing:
            raise KeyError(f"optimizer state without {', '.join(missing)}: the checkpoint was not written by AdamATan2")
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            # Also without a gradient: ranks must agree on which states exist when they save.
            states = [self.init_state(p) for p in group["params"]]
            if not self.has_gradient(group):
                continue
            group[UPDATES] += 1
            t, lr, (b1, b2) = group[UPDATES], group["lr"], group["betas"]
            for p, state in zip(group["params"], states, strict=True):
                if p.grad is None:
                    continue
                m, v = state["exp_avg"], state["exp_avg_sq"]
                g = p.grad.to(m.dtype)
                p.mul_(1 - lr * group["weight_decay"])
                m.lerp_(g, 1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                denominator = v.sqrt().div_(math.sqrt(1 - b2 ** t))
                p.add_(torch.atan2(m, denominator), alpha=-lr / (1 - b1 ** t))
                state["ema"].lerp_(p, 1 - group["ema_decay"])


def init_states(optimizer: AdamATan2, config: Any = None) -> None:
    """Make the state of all parameters (Megatron's `init_state_fn`)."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.init_state(p)
