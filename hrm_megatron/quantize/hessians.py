"""What a matrix of an HRM sees: second moments of its inputs, over all ticks that it serves."""
from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from hrm_megatron.config import Architecture
from hrm_megatron.quantize.recurrence import Recurrence, Rows, Weights, matmul_with


@dataclass
class Moments:
    """Of the inputs of one matrix: `hessian` is the sum of x x^T over its inputs x of the quantized model, `cross` of
    f x^T with the inputs f of the full one at the same tick and position. fp64 [in, in]."""

    hessian: torch.Tensor
    cross: torch.Tensor


@torch.no_grad()
def moments(architecture: Architecture, full: Weights, quantized: Weights, names: Collection[str],
            calibration: Iterable[Rows], first_tick_only: bool = False) -> dict[str, Moments]:
    """Sum up the inputs of the named matrices over rows, and over all ticks or the first alone.

    The trajectories are those of the weights `full` and of `quantized`, each its own from the embedding on. Padding
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
    """Inputs [n, in] of each named matrix, tick by tick."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    plain = matmul_with(weights)

    def watched(name: str, x: torch.Tensor) -> torch.Tensor:
        if name in inputs:  # the head is given labelled positions alone
            inputs[name].append(x.flatten(0, 1)[rows.positions] if x.dim() == 3 else x)
        return plain(name, x)
    model = Recurrence(architecture, weights, watched)
    model.label_logits(model.states(rows), rows)
    return inputs
