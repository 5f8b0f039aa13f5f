"""Run the ticks of an HRM over two stacks: which input each takes, which build a graph."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from megatron.core import tensor_parallel

from hrm_megatron.model.schedule import Tick

Stack = Callable[[torch.Tensor], torch.Tensor]
Recorder = Callable[[str, torch.Tensor], None]


def recomputed(stack: Stack) -> Stack:
    """Make a stack that keeps only its input, which must require a gradient, and is recomputed in backward.

    Megatron's recomputation, which is reentrant: what a layer recomputes by itself works inside it.
    """
    def run(x: torch.Tensor) -> torch.Tensor:
        # Detached the first time: stock layers turn gradients on again for their residual sum.
        return stack(x if torch.is_grad_enabled() else x.detach())
    return lambda x: tensor_parallel.checkpoint(run, False, x)


def run_ticks(ticks: Iterable[Tick], stack_of: Callable[[Tick], Stack], z_h: torch.Tensor, z_l: torch.Tensor, *,
              recompute: bool = False, record: Recorder | None = None) -> torch.Tensor:
    """Return the last z_H: each tick replaces its stack's state by stack(z_L + z_H), all [s, b, h].

    `recompute` says that layers recompute activations by themselves. `record` is called with the name and value of
    every new state. Source: HRM-Text, hrm_nocarry_bp_warmup.
    """
    states = {"H": z_h, "L": z_l}
    for number, tick in enumerate(ticks):
        with_grad = torch.is_grad_enabled() and tick.with_grad
        with torch.set_grad_enabled(with_grad):
            inputs = states["L"] + states["H"]
            if not with_grad:
                # Stock layers turn gradients on again for their residual sum (bias_dropout_add_exec_handler).
                inputs = inputs.detach()
            elif (recompute or tick.recompute) and not inputs.requires_grad:
                # Reentrant recomputation of an input without gradient would give the weights none either.
                inputs.requires_grad_()
            states[tick.stack] = stack_of(tick)(inputs)
        if record:
            record(f"tick{number:02d}.z_{tick.stack}", states[tick.stack])
    return states["H"]
