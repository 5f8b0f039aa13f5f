"""Run the ticks of a recurrence: the states each reads and writes, and whether it builds a graph."""
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
    """Return a stack that keeps only its input, which must require a gradient, and recomputes the rest in backward.

    Uses Megatron's checkpoint function, which is reentrant, so the layers' own recompute can be nested in it.
    """
    def run(x: torch.Tensor) -> torch.Tensor:
        # Detached in the first run, without gradients: stock layers turn gradients on again for their residual sum.
        return stack(x if torch.is_grad_enabled() else x.detach())
    return lambda x: tensor_parallel.checkpoint(run, False, x)


def summed(states: Mapping[str, torch.Tensor], reads: str) -> torch.Tensor:
    """Return the sum of the states that a tick reads, in that order."""
    return functools.reduce(operator.add, [states[name] for name in reads])


def run_ticks(ticks: Iterable[Tick], stack_of: Callable[[Tick], Stack], z_h: torch.Tensor, z_l: torch.Tensor | None, *,
              recompute: bool = False, record: Recorder | None = None) -> torch.Tensor:
    """Return the state that the last tick writes. Each tick replaces one state by stack(sum of the states it reads),
    all [s, b, h]; `z_l` may be None if no tick reads it before one writes it.

    `recompute`: the layers recompute activations themselves. `record` is called with the name and value of every new
    state. Source: HRM-Text, hrm_nocarry_bp_warmup.
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
                # With an input that requires no gradient, reentrant recompute would give the weights none.
                inputs.requires_grad_()
            last = states[tick.writes] = stack_of(tick)(inputs)
        if record:
            record(f"tick{number:02d}.z_{tick.writes}", last)
    return last
