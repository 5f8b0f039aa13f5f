"""Ways to choose the codes of a whole model: plain rounding, and calibration over the first tick or over all."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from hrm_megatron.config import Architecture
from hrm_megatron.convert.low_bit import LowBit
from hrm_megatron.convert.quantization import Quantization
from hrm_megatron.convert.table import Rename, is_embedding, table
from hrm_megatron.quantize.hessians import moments
from hrm_megatron.quantize.recurrence import HEAD, Rows, Weights, layer_weights
from hrm_megatron.quantize.rounding import Rounded, aligned, round_by_hessian, round_plainly
from hrm_megatron.quantize.tuning import Tuning, tune

PLAIN, FIRST_TICK, RECURRENT = "rtn", "tick0", "recurrent"
METHODS = (PLAIN, FIRST_TICK, RECURRENT)
Say = Callable[[str], object]


@dataclass(frozen=True)
class Calibration:
    """Calibration rows: `rows()` starts over, the same every time; `endless()` yields further rows, for tuning."""

    rows: Callable[[], Iterator[Rows]]
    endless: Callable[[], Iterator[Rows]]


class Quantizer:
    """Quantizes one model by several methods. `weights` are all of its tensors in fp32, by transformers' names; tensors
    that stay floats are rounded to `dtype`, as in the file."""

    def __init__(self, architecture: Architecture, weights: Weights, quantization: Quantization, dtype: torch.dtype,
                 say: Say = lambda line: None) -> None:
        self.architecture, self.full, self.quantization, self.dtype, self.say = (
            architecture, weights, quantization, dtype, say)
        self.entries = table(architecture)

    def dequantized(self, matrices: Mapping[str, LowBit]) -> dict[str, torch.Tensor]:
        """Return all weights as a loader of the file computes with them."""
        return {entry.hf: matrices[entry.hf].dequantized() if entry.hf in matrices
                else self.full[entry.hf].to(self.dtype).float() for entry in self.entries}

    def plainly(self) -> dict[str, LowBit]:
        """Round every matrix independently."""
        return {entry.hf: matrix for entry in self.entries if (matrix := self._plain(entry))}

    def by_first_tick(self, calibration: Calibration) -> dict[str, LowBit]:
        """Round by the inputs of the first tick of each stack, as tools that know no recurrence do."""
        return self._matrices(self._calibrated(calibration, first_tick_only=True))

    def by_all_ticks(self, calibration: Calibration, tuning: Tuning) -> dict[str, LowBit]:
        """Round by the inputs of all ticks towards the outputs of the full model, then tune all matrices jointly."""
        rounded = self._calibrated(calibration, first_tick_only=False)
        if not tuning.steps:
            return self._matrices(rounded)
        fixed = self.dequantized(self._matrices({}))
        return {**self._matrices({}), **tune(self.architecture, self.full, fixed, rounded, calibration.endless(),
                                             tuning, self.say)}

    def _plain(self, entry: Rename) -> LowBit | None:
        scheme = self.quantization.of(entry)
        return round_plainly(self.full[entry.hf], scheme) if scheme else None

    def _matrices(self, rounded: Mapping[str, Rounded]) -> dict[str, LowBit]:
        """Return these matrices, and the embedding, which is a look-up and has no inputs to calibrate with."""
        looked_up = {entry.hf: self._plain(entry) for entry in self.entries if is_embedding(entry)}
        return {name: matrix for name, matrix in looked_up.items() if matrix} | {
            name: each.matrix for name, each in rounded.items()}

    def _calibrated(self, calibration: Calibration, first_tick_only: bool) -> dict[str, Rounded]:
        """Round layer by layer in the order of a cycle; the inputs are those with all earlier layers quantized."""
        a = self.architecture
        parts = [[*layer_weights(stack, layer).values()] for stack in "LH" for layer in range(a.num_layers)] + [[HEAD]]
        trajectory = {**self.full, **{name: each.dequantized() for name, each in self._matrices({}).items()}}
        rounded: dict[str, Rounded] = {}
        for number, names in enumerate(parts, start=1):
            found = moments(a, self.full, trajectory, names, calibration.rows(), first_tick_only)
            for name in names:
                weight = self.full[name] if first_tick_only else aligned(self.full[name], found[name])
                rounded[name] = round_by_hessian(weight, found[name].hessian, self.quantization.linear)
                trajectory[name] = rounded[name].matrix.dequantized()
            self.say(f"calibrated: {number} of {len(parts)} layers")
        return rounded
