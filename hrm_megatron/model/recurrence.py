"""Run the ticks of a recurrence: which states each takes, which it replaces, which build a graph."""
from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping

import torch
from megatron.core import tensor_parallel

from hrm_megatron.model.ticks import Tick

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


def summed(states: Mapping[str, torch.Tensor], reads: str) -> torch.Tensor:
    """Add up the states that a tick reads, in its order."""
    return functools.reduce(operator.add, [states[name] for name in reads])


def run_ticks(ticks: Iterable[Tick], stack_of: Callable[[Tick], Stack], z_h: torch.Tensor, z_l: torch.Tensor | None, *,
              recompute: bool = False, record: Recorder | None = None) -> torch.Tensor:
    """Return the state that the last tick leaves: each replaces one by stack(sum of those that it reads), all
    [s, b, h]; `z_l` None: no tick reads it before it is there.

    `recompute` says that layers recompute activations by themselves. `record` is called with the name and value of
    every new state. Source: HRM-Text, hrm_nocarry_bp_warmup.
    """
    states = {"H": z_h} if z_l is None else {"H": z_h, "L": z_l}
    last = z_h
    for number, tick in enumerate(ticks):
        with_grad = torch.is_grad_enabled() and tick.with_grad
        with torch.set_grad_enabled(with_grad):
            inputs = summed(states, tick.reads)
            if not with_grad:
                # Stock layers turn gradients on again for their residual sum (bias_dropout_add_exec_handler).
                inputs = inputs.detach()
            elif (recompute or tick.recompute) and not inputs.requires_grad:
                # Reentrant recomputation of an input without gradient would give the weights none either.
                inputs.requires_grad_()
            last = states[tick.writes] = stack_of(tick)(inputs)
        if record:
            record(f"tick{number:02d}.z_{tick.writes}", last)
    return last
