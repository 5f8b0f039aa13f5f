"""Packed PrefixLM attention behind one door: `core_attention(kernel)` picks the class that a layer builds.

`DenseAttention` is the definition. The others make two calls per example, prefixes without a mask and responses
with a causal one at the bottom right, and never hold a mask of the whole row. A kernel of a GPU library becomes
one more class in `KERNELS`.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from hrm_megatron.config import ConfigError
from hrm_megatron.model.cpu_flash import PackedCpuFlash
from hrm_megatron.model.prefix_lm import PrefixSequences


class PrefixLMAttention(MegatronModule):  # type: ignore[misc]
    """Core attention of a stock SelfAttention: rotate queries and keys, then attend inside each example.

    Query, key, value come as [s, b, heads/tp, d], the result leaves as [s, b, heads/tp * d]; padding gives
    zeros. The rotation happens here rather than in the layer, in fp32 and with a table made once per batch
    (the stock unfused one rounds cosines to bf16).
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str,
                 softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ConfigError(f"context_parallel_size={config.context_parallel_size}: this attention kernel sees "
                              "whole rows only; use 1")
        self.softmax_scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None = None,
                attn_mask_type: Any = None, attention_bias: None = None,
                packed_seq_params: PrefixSequences | None = None) -> torch.Tensor:
        assert packed_seq_params is not None, "PrefixLM attention needs the lengths of its examples"
        rotate = packed_seq_params.rotation
        rows = [self.attend(q, k, v, packed_seq_params, row) for row, (q, k, v) in enumerate(zip(
            rotate(query).unbind(1), rotate(key).unbind(1), value.unbind(1), strict=True))]
        return rows[0].unsqueeze(1) if len(rows) == 1 else torch.stack(rows, 1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
               row: int) -> torch.Tensor:
        """Attention of one row: q, k, v [s, heads/tp, d] to [s, heads/tp * d]."""
        raise NotImplementedError


class DenseAttention(PrefixLMAttention):
    """The definition in fp64, with the mask of the whole row: quadratic in the row, for tests and small rows."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
               row: int) -> torch.Tensor:
        scale = self.softmax_scale or q.shape[-1] ** -0.5
        allowed = sequences.dense_mask(row, q.shape[0]).to(q.device)
        scores = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * scale
        # A finite floor: a padding position sees nobody, and -inf everywhere would give NaN gradients.
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~allowed, 0)
        return torch.einsum("hij,jhd->ihd", weights, v.double()).flatten(1).to(q.dtype)


class SdpaAttention(PrefixLMAttention):
    """torch's scaled_dot_product_attention, two calls per example: for any GPU without a better kernel."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
               row: int) -> torch.Tensor:
        pairs = sequences.lengths[row]
        sizes = [p + r for p, r in pairs]
        pad = q.shape[0] - sum(sizes)
        outputs = []
        # split, not slices: their backward would add one full-size zero tensor per example.
        for (p, r), example in zip(pairs, zip(*(t.split([*sizes, pad]) for t in (q, k, v)), strict=True),
                                   strict=False):
            q_i, k_i, v_i = (t.transpose(0, 1).unsqueeze(0) for t in example)  # [1, heads/tp, p + r, d]
            prefix, response = q_i.split([p, r], 2)
            parts = [F.scaled_dot_product_attention(prefix, k_i[:, :, :p], v_i[:, :, :p], scale=self.softmax_scale)]
            if r:
                parts.append(F.scaled_dot_product_attention(
                    response, k_i, v_i, attn_mask=sequences.response_bias(p, r, q), scale=self.softmax_scale))
            outputs += [part.squeeze(0).transpose(0, 1).flatten(1) for part in parts]
        if pad:
            outputs.append(q.new_zeros(pad, q.shape[1] * q.shape[2]))
        return torch.cat(outputs)


class CpuAttention(PrefixLMAttention):
    """The same two calls on torch's CPU flash kernel, as one autograd function over the row."""

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
