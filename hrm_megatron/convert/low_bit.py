"""Quantized matrices: codes and scales, and the tensors that represent them in compressed-tensors' files.

A weight equals its code times the scale of its group exactly: the product of a code and a bfloat16 scale fits in fp32.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # doubled magnitudes of OCP's 4-bit float, indexed by their 3 bits (MX v1.0, 5.3.3)
E2M1_LARGEST_EXPONENT = 2  # of 6 = 1.5 * 2^2
E8M0_BIAS = 127  # of MX's shared scale, a power of two in a byte


@dataclass(frozen=True)
class Scheme:
    """How a matrix [out, in] is stored: format name, and number of weights of a row that share a scale (0: all)."""

    name: str
    group_size: int

    @property
    def is_float(self) -> bool:
        return self.name == "mxfp4"

    @property
    def bits(self) -> int:
        return 8 if self.name == "int8" else 4

    @property
    def format(self) -> str:
        """compressed-tensors' name of the storage layout."""
        return {"int4": "pack-quantized", "int8": "int-quantized", "mxfp4": "mxfp4-pack-quantized"}[self.name]

    @property
    def largest(self) -> int:
        return E2M1[-1] if self.is_float else 2 ** (self.bits - 1) - 1

    @property
    def smallest(self) -> int:
        return -E2M1[-1] if self.is_float else -2 ** (self.bits - 1)

    @property
    def unit(self) -> float:
        """Value of code 1 in units of the scale."""
        return 0.5 if self.is_float else 1.0

    def groups(self, columns: int) -> int:
        return columns // (self.group_size or columns)

    def arguments(self) -> dict[str, Any]:
        """Return it as compressed-tensors' `weights` of a config group."""
        strategy: dict[str, Any] = dict(strategy="group", group_size=self.group_size) if self.group_size else dict(
            strategy="channel")
        scale = dict(scale_dtype="torch.uint8") if self.is_float else {}
        return dict(num_bits=self.bits, type="float" if self.is_float else "int", symmetric=True, dynamic=False,
                    **strategy, **scale)

    def nearest(self, codes: torch.Tensor) -> torch.Tensor:
        """Round numbers, in units of a code, to the nearest valid codes."""
        if not self.is_float:
            return codes.round().clamp(self.smallest, self.largest)
        levels = torch.tensor(E2M1, dtype=codes.dtype, device=codes.device)
        return levels[torch.bucketize(codes.abs(), (levels[1:] + levels[:-1]) / 2)] * codes.sign()

    def scales(self, largest: torch.Tensor) -> torch.Tensor:
        """Return fp32 scales for groups with these largest magnitudes, chosen as by compressed-tensors' observers and
        rounded to values that a file can hold."""
        if self.is_float:
            # 7 and above would round to 8, which does not exist: take the next power of two. 7 = 0.875 * 2^3.
            exponents = torch.frexp(largest.clamp_min(2.0 ** -100) / 0.875).exponent - 1
            return torch.exp2((exponents - E2M1_LARGEST_EXPONENT).float())
        return stored_scale(largest / ((self.largest - self.smallest) / 2))


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round scales to the bfloat16 that a file holds, none to zero."""
    return scale.clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16().float()


@dataclass(frozen=True)
class LowBit:
    """A matrix [out, in]: codes int8 [out, in], doubled for float formats, and scales fp32 [out, groups]."""

    codes: torch.Tensor
    scales: torch.Tensor
    scheme: Scheme

    def dequantized(self) -> torch.Tensor:
        """Return the matrix in fp32."""
        codes = self.codes.float().mul_(self.scheme.unit).unflatten(1, (self.scales.shape[1], -1))
        return codes.mul_(self.scales.unsqueeze(-1)).flatten(1)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a matrix in a file: the suffix after the weight's name, and how to make it from the matrix."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[LowBit], torch.Tensor]


def stored_tensors(scheme: Scheme, shape: tuple[int, ...], parts: int) -> list[StoredTensor]:
    """List the tensors of a matrix of this shape that spans `parts` modules of transformers."""
    rows, columns = shape
    scale = StoredTensor("_scale", torch.bfloat16, (rows, scheme.groups(columns)), lambda m: m.scales.bfloat16())
    if scheme.name == "int8":
        return [StoredTensor("", torch.int8, (rows, columns), lambda m: m.codes), scale]
    if scheme.is_float:
        return [StoredTensor("_packed", torch.uint8, (rows, columns // 2), _packed_floats),
                StoredTensor("_scale", torch.uint8, (rows, scheme.groups(columns)), _exponents)]
    # transformers splits `_shape` by rows, too, so that each module gets its own shape.
    return [StoredTensor("_packed", torch.int32, (rows, columns // 8), _packed_integers), scale,
            StoredTensor("_shape", torch.int64, (2 * parts,), lambda m: torch.tensor([rows // parts, columns] * parts))]


def from_stored(scheme: Scheme, shape: tuple[int, ...], tensors: dict[str, torch.Tensor]) -> LowBit:
    """Build a matrix from its tensors, keyed by suffix."""
    if scheme.name == "int8":
        return LowBit(tensors[""], tensors["_scale"].float(), scheme)
    if scheme.is_float:
        bits = _unpaired(tensors["_packed"])
        codes = torch.tensor(E2M1, dtype=torch.int8)[(bits & 7).long()]
        scales = torch.exp2(tensors["_scale"].float() - E8M0_BIAS)
        return LowBit(torch.where(bits > 7, -codes, codes), scales, scheme)
    codes = _unpaired(tensors["_packed"].view(torch.uint8)).to(torch.int8) - 8
    return LowBit(codes.view(shape), tensors["_scale"].float(), scheme)


def _packed_integers(matrix: LowBit) -> torch.Tensor:
    return _paired((matrix.codes + 8).to(torch.uint8)).view(torch.int32)  # the first code in the lowest bits


def _packed_floats(matrix: LowBit) -> torch.Tensor:
    magnitudes = torch.bucketize(matrix.codes.abs().int(), torch.tensor(E2M1, dtype=torch.int32)).to(torch.uint8)
    return _paired(magnitudes + 8 * (matrix.codes < 0).to(torch.uint8))


def _exponents(matrix: LowBit) -> torch.Tensor:
    return (matrix.scales.log2() + E8M0_BIAS).to(torch.uint8)


def _paired(bits: torch.Tensor) -> torch.Tensor:
    return bits[:, 0::2] | bits[:, 1::2] << 4


def _unpaired(pairs: torch.Tensor) -> torch.Tensor:
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)
