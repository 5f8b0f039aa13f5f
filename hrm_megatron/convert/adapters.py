"""Merge the LoRA adapters of a fine-tuned checkpoint into the weights that they change, while these are read."""
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
    """The adapters of a checkpoint, and the tensors of its table that they adapt."""

    lora: LoRA

    def on(self, entry: Rename) -> bool:
        """Return whether this tensor is the weight of an adapted layer."""
        return entry.trained and entry.megatron.split(".")[-2] in self.lora.targets

    def factors(self, entries: Iterable[Rename]) -> Iterator[Rename]:
        """Yield the entries of the factors A and B of these tensors; they exist only in Megatron's format."""
        for entry in filter(self.on, entries):
            n, k = entry.shape
            layer = entry.megatron.removesuffix("weight")
            for name, shape in ((A, (self.lora.rank, k)), (B, (n, self.lora.rank))):
                yield Rename(f"{layer}{name}", "", "", shape)

    def merged(self, read: Callable[[str, Rename], torch.Tensor], part: str, entry: Rename) -> torch.Tensor:
        """Read a frozen fp32 weight, plus scale * B A of this part (raw, or EMA of each factor) if adapted."""
        weight = read(RAW, entry)
        if not self.on(entry):
            return weight
        a, b = (read(part, factor) for factor in self.factors([entry]))
        return merged(weight, a, b, self.lora.scale)
