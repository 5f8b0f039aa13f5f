"""Early exit: an answer runs only as many H cycles as its prompt needed until z_H stopped changing much.

This is decided once for each answer, when its prompt is read: cycle t is the last if ||z_H(t) - z_H(t-1)|| is less than
a share of ||z_H(t)||, over all positions of the prompt; z_H(0) is the embedding. All tokens of the answer then run that
many cycles. So no token needs keys and values of a tick that an earlier token skipped, and an answer equals that of a
model built with that many cycles. The approximation: the number is decided by the prompt, while a token of the answer
may still change z_H by more.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from hrm_megatron.generate.decoder import Attention, Decoder

Ends = Callable[[int, np.ndarray, torch.Tensor, torch.Tensor], np.ndarray]


def changes(before: torch.Tensor, after: torch.Tensor, counts: np.ndarray) -> np.ndarray:
    """Return ||after - before|| / ||after|| of each row; states [n, h] hold the `counts` positions of the rows in
    order."""
    squares = torch.stack([(after - before).float().square().sum(-1), after.float().square().sum(-1)])
    moved, size = torch.stack([part.sum(1) for part in squares.split(counts.tolist(), 1)], 1).sqrt().cpu().numpy()
    found: np.ndarray = moved / size
    return found


def ends_below(threshold: float, counts: np.ndarray) -> Ends:
    """Return the rule that ends a prompt after the first cycle with a relative change of z_H below `threshold`."""
    return lambda done, rows, before, after: changes(before, after, counts[rows]) < threshold


def ends_after(cycles: np.ndarray) -> Ends:
    """Return the rule that ends each row after its number of `cycles`."""
    return lambda done, rows, before, after: cycles[rows] <= done


def run_cycles(decoder: Decoder, tokens: np.ndarray, counts: np.ndarray, attending: Callable[[np.ndarray], Attention],
               ends: Ends) -> tuple[torch.Tensor, np.ndarray]:
    """Run H cycles over rows of `counts` positions until all have ended; return z_H [n, h] and each row's cycles.

    `attending(rows)` returns the attention of the rows still running (ascending numbers). `ends(done, rows, before,
    after)` returns which of them end after cycle `done`, from z_H [positions, h] before and after it.
    """
    states = decoder.begin(tokens)
    found, cycles = torch.empty_like(states["H"]), np.zeros(len(counts), np.int32)
    rows, places, attend = np.arange(len(counts)), np.arange(len(tokens)), attending(np.arange(len(counts)))
    for done in range(1, decoder.architecture.h_cycles + 1):
        before = states["H"]
        decoder.run_cycle(done - 1, states, attend)
        ended = ends(done, rows, before, states["H"]) | (done == decoder.architecture.h_cycles)
        if not ended.any():
            continue
        positions = np.repeat(ended, counts[rows])
        found[places[positions]] = states["H"][positions]
        cycles[rows[ended]] = done
        rows, places = rows[~ended], places[~positions]
        if not len(rows):
            break
        states = {name: state[~positions] for name, state in states.items()}
        attend = attending(rows)
    return found, cycles
