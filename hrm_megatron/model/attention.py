"""Packed PrefixLM attention behind one door: `core_attention(kernel)` picks the class that a layer builds.

`DenseAttention` is the definition. The others make two calls per example, prefixes without a mask and responses
with a causal one at the bottom right, and never hold a mask of the whole row. A kernel of a GPU library becomes
one more class in `KERNELS`.
"""
from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from hrm_megatron.config import ConfigError
from hrm_megatron.model.cpu_flash import PackedCpuFlash
from hrm_megatron.model.prefix_lm import PrefixSequences
from hrm_megatron.parallel.context import GatherRows


class PrefixLMAttention(MegatronModule):  # type: ignore[misc]
    """Core attention of a stock SelfAttention: rotate queries and keys, then attend inside each example.

    Query, key, value come as [s/cp, b, heads/tp, d], the result leaves as [s/cp, b, heads/tp * d]; padding gives
    zeros. The rotation happens here rather than in the layer, in fp32 and with a table made once per batch
    (the stock unfused one rounds cosines to bf16). Under context parallelism keys and values are gathered.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str,
                 softmax_scale: float | None = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None = None,
                attn_mask_type: Any = None, attention_bias: None = None,
                packed_seq_params: PrefixSequences | None = None) -> torch.Tensor:
        assert packed_seq_params is not None, "PrefixLM attention needs the lengths of its examples"
        query, key = packed_seq_params.rotation(query), packed_seq_params.rotation(key)
        if self.context_group is not None:
            key, value = GatherRows.apply(torch.stack((key, value), 1), self.context_group).unbind(1)
        rows = [self.attend(q, k, v, packed_seq_params, row) for row, (q, k, v) in enumerate(zip(
            query.unbind(1), key.unbind(1), value.unbind(1), strict=True))]
        return rows[0].unsqueeze(1) if len(rows) == 1 else torch.stack(rows, 1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
               row: int) -> torch.Tensor:
        """Attention of one row: q [s/cp, heads/tp, d] and k, v [s, heads/tp, d] to [s/cp, heads/tp * d]."""
        raise NotImplementedError


class DenseAttention(PrefixLMAttention):
    """The definition in fp64, with the mask of the whole row: quadratic in the row, for tests and small rows."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
               row: int) -> torch.Tensor:
        scale = self.softmax_scale or q.shape[-1] ** -0.5
        allowed = sequences.dense_mask(row)
        if sequences.spans:
            allowed = torch.cat([allowed[span.start:span.start + span.length] for span in sequences.spans])
        allowed = allowed.to(q.device)
        scores = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * scale
        # A finite floor: a padding position sees nobody, and -inf everywhere would give NaN gradients.
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~allowed, 0)
        return torch.einsum("hij,jhd->ihd", weights, v.double()).flatten(1).to(q.dtype)


class SdpaAttention(PrefixLMAttention):
    """torch's scaled_dot_product_attention, one call per piece: for any GPU without a better kernel."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
               row: int) -> torch.Tensor:
        sizes = [p + r for p, r in sequences.lengths[row]]
        starts = [0, *itertools.accumulate(sizes)]
        # split, not slices of the row: their backward would add one tensor of the row's size per piece.
        examples = dict(zip(starts, zip(*(t[:starts[-1]].split(sizes) for t in (k, v)), strict=True), strict=False))
        pieces = sequences.pieces(row)
        lengths = [piece.queries[1] for piece in pieces]
        pad = len(q) - sum(lengths)  # the end of the row, so also the end of each rank's slice
        outputs = []
        for piece, query in zip(pieces, q.split([*lengths, pad]), strict=False):
            keys, values = (t[:piece.keys[1]] for t in examples[piece.keys[0]])
            query, keys, values = (t.transpose(0, 1).unsqueeze(0) for t in (query, keys, values))
            part = F.scaled_dot_product_attention(query, keys, values, scale=self.softmax_scale,
                                                  attn_mask=sequences.causal_bias(piece, q))
            outputs.append(part.squeeze(0).transpose(0, 1).flatten(1))
        if pad:
            outputs.append(q.new_zeros(pad, q.shape[1] * q.shape[2]))
        return torch.cat(outputs)


class CpuAttention(PrefixLMAttention):
    """The same pieces on torch's CPU flash kernel, as one autograd function over the row."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
               row: int) -> torch.Tensor:
        out: torch.Tensor = PackedCpuFlash.apply(q, k, v, sequences, row, self.softmax_scale)
        return out.flatten(1)


KERNELS: dict[str, type[PrefixLMAttention]] = {"dense": DenseAttention, "sdpa": SdpaAttention,
                                            "cpu": CpuAttention}
AUTO = "auto"


def core_attention(kernel: str = AUTO) -> type[PrefixLMAttention]:
    """Return the class for `--attention-kernel`; "auto" takes the fastest that runs here."""
    if kernel == AUTO:
        return SdpaAttention if torch.cuda.is_available() else CpuAttention
    if kernel not in KERNELS:
        raise ConfigError(f"attention_kernel={kernel!r}: choose one of {AUTO}, {', '.join(KERNELS)}")
    return KERNELS[kernel]
