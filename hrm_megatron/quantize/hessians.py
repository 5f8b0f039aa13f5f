"""Second moments of the inputs of an HRM's matrices, over all ticks in which they are used."""
from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from hrm_megatron.config import Architecture
from hrm_megatron.quantize.recurrence import Recurrence, Rows, Weights, matmul_with


@dataclass
class Moments:
    """Moments of the inputs of one matrix, fp64 [in, in]: `hessian` is the sum of x x^T over inputs x of the quantized
    model, `cross` that of f x^T, where f is the full model's input at the same tick and position."""

    hessian: torch.Tensor
    cross: torch.Tensor


@torch.no_grad()
def moments(architecture: Architecture, full: Weights, quantized: Weights, names: Collection[str],
            calibration: Iterable[Rows], first_tick_only: bool = False) -> dict[str, Moments]:
    """Accumulate the moments of the named matrices over rows, and over all ticks or only the first.

    Both trajectories, of the weights `full` and `quantized`, are computed independently from the embedding on. Padding
    is left out.
    """
    found: dict[str, Moments] = {}
    for rows in calibration:
        expected = _inputs(architecture, full, names, rows)
        for name, given in _inputs(architecture, quantized, names, rows).items():
            for x, f in [*zip(given, expected[name], strict=True)][:1 if first_tick_only else None]:
                if name not in found:
                    width = x.shape[1]
                    found[name] = Moments(*(x.new_zeros(width, width, dtype=torch.float64) for _ in range(2)))
                found[name].hessian += x.t() @ x
                found[name].cross += f.t() @ x
    return found


def _inputs(architecture: Architecture, weights: Weights, names: Collection[str],
            rows: Rows) -> dict[str, list[torch.Tensor]]:
    """Return the inputs [n, in] of each named matrix, tick by tick."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    plain = matmul_with(weights)

    def watched(name: str, x: torch.Tensor) -> torch.Tensor:
        if name in inputs:  # the head gets only labelled positions
            inputs[name].append(x.flatten(0, 1)[rows.positions] if x.dim() == 3 else x)
        return plain(name, x)
    model = Recurrence(architecture, weights, watched)
    model.label_logits(model.states(rows), rows)
    return inputs
