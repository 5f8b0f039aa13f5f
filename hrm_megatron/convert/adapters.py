"""Merge the adapters of a fine-tuning into the weights that they change, as these are read."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from hrm_megatron.config import LoRA
from hrm_megatron.convert.checkpoint import RAW
from hrm_megatron.convert.table import Rename
from hrm_megatron.layers.lora import merged

A, B = "lora.A", "lora.B"


@dataclass(frozen=True)
class Adapters:
    """The adapters of a checkpoint, on those tensors of its table that they are on."""

    lora: LoRA

    def on(self, entry: Rename) -> bool:
        """Tell whether this tensor is the weight of an adapted layer."""
        return entry.trained and entry.megatron.split(".")[-2] in self.lora.targets

    def factors(self, entries: Iterable[Rename]) -> Iterator[Rename]:
        """List the factors beside these tensors; nothing but Megatron's format has them."""
        for entry in filter(self.on, entries):
            n, k = entry.shape
            layer = entry.megatron.removesuffix("weight")
            for name, shape in ((A, (self.lora.rank, k)), (B, (n, self.lora.rank))):
                yield Rename(f"{layer}{name}", "", "", shape)

    def merged(self, read: Callable[[str, Rename], torch.Tensor], part: str, entry: Rename) -> torch.Tensor:
        """Read a frozen weight in fp32, with B A of this part (raw, or the EMA of each factor) where it is adapted."""
        weight = read(RAW, entry)
        if not self.on(entry):
            return weight
        a, b = (read(part, factor) for factor in self.factors([entry]))
        return merged(weight, a, b, self.lora.scale)
