"""Packed PrefixLM attention: `core_attention(kernel, dtype, head_dim)` selects the class that a layer instantiates.

`DenseAttention` is the reference. The others never build a mask of the whole row: queries of prefixes run without a
mask, queries of responses with a causal mask aligned to the bottom right. `sdpa` and `cpu` make one call per piece of
an example; `varlen`, `te` and `flash` two calls for all rows. `attention.kernel_choice` holds the rules.
"""
from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from hrm_megatron.attention.cpu_flash import PackedCpuFlash
from hrm_megatron.attention.flash import choose_generation, flash_varlen
from hrm_megatron.attention.kernel_choice import choose_kernel
from hrm_megatron.attention.prefix_lm import PrefixSequences
from hrm_megatron.attention.te_attention import TransformerEngineVarlen
from hrm_megatron.attention.varlen import Primitive, attend_in_calls, nothing_of, torch_varlen, varlen_calls
from hrm_megatron.parallel.context import GatherRows
from hrm_megatron.parallel.machine import Machine


class PrefixLMAttention(MegatronModule):  # type: ignore[misc]
    """Core attention of Megatron's SelfAttention: rotate queries and keys, then attend within each example.

    Query, key and value are [s/cp, b, heads/tp, d], the result is [s/cp, b, heads/tp * d]; padding gives zeros. The
    rotation is done here, not in the layer: in fp32, with a table computed once per batch (Megatron's unfused one
    rounds cosines to bf16). Under context parallelism keys and values are gathered.
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
        query, key = packed_seq_params.rotation(query, key)
        out: torch.Tensor = self.attend_to_all(query, key, value, packed_seq_params)
        return out

    def attend_to_all(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                      sequences: PrefixSequences) -> torch.Tensor:
        """Attend to the keys of all context parallel ranks, in the shapes of `forward`."""
        if self.context_group is not None:
            key, value = GatherRows.apply(torch.stack((key, value), 1), self.context_group).unbind(1)
        return self.attend(query, key, value, sequences)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences) -> torch.Tensor:
        """Attend in all rows: q [s/cp, b, heads/tp, d] and k, v [s, b, heads/tp, d] to [s/cp, b, heads/tp * d]."""
        rows = [self.attend_row(*one, sequences, row) for row, one in enumerate(zip(
            q.unbind(1), k.unbind(1), v.unbind(1), strict=True))]
        return rows[0].unsqueeze(1) if len(rows) == 1 else torch.stack(rows, 1)

    def attend_row(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
                   row: int) -> torch.Tensor:
        """Attend in one row: q [s/cp, heads/tp, d] and k, v [s, heads/tp, d] to [s/cp, heads/tp * d]."""
        raise NotImplementedError


class DenseAttention(PrefixLMAttention):
    """The reference in fp64, with the mask of the whole row: quadratic in the row, for tests and small rows."""

    def attend_row(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
                   row: int) -> torch.Tensor:
        scale = self.softmax_scale or q.shape[-1] ** -0.5
        allowed = sequences.dense_mask(row)
        if sequences.spans:
            allowed = torch.cat([allowed[span.start:span.start + span.length] for span in sequences.spans])
        allowed = allowed.to(q.device)
        scores = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * scale
        # A finite minimum: a padding position attends to nothing, and -inf everywhere would give NaN gradients.
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~allowed, 0)
        return torch.einsum("hij,jhd->ihd", weights, v.double()).flatten(1).to(q.dtype)


class SdpaAttention(PrefixLMAttention):
    """torch's scaled_dot_product_attention, one call per piece: for GPUs without a better kernel."""

    def attend_row(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
                   row: int) -> torch.Tensor:
        sizes = [p + r for p, r in sequences.lengths[row]]
        starts = [0, *itertools.accumulate(sizes)]
        # split, not slices: each slice's backward would allocate and add a tensor of the whole row.
        examples = dict(zip(starts, zip(*(t[:starts[-1]].split(sizes) for t in (k, v)), strict=True), strict=False))
        pieces = sequences.pieces(row)
        lengths = [piece.queries[1] for piece in pieces]
        pad = len(q) - sum(lengths)  # padding ends the row, and so each rank's slice
        outputs = []
        for piece, query in zip(pieces, q.split([*lengths, pad]), strict=False):
            keys, values = (t[:piece.keys[1]] for t in examples[piece.keys[0]])
            query, keys, values = (t.transpose(0, 1).unsqueeze(0) for t in (query, keys, values))
            part = F.scaled_dot_product_attention(query, keys, values, scale=self.softmax_scale,
                                                  attn_mask=sequences.causal_bias(piece, q))
            outputs.append(part.squeeze(0).transpose(0, 1).flatten(1))
        if pad:
            outputs.append(q.new_zeros(pad, q.shape[1] * q.shape[2]))
        return torch.cat(outputs if pieces else [*outputs, nothing_of(q, k, v).flatten(1)])


class CpuAttention(PrefixLMAttention):
    """The same pieces on torch's CPU flash kernel, as one autograd function over the row."""

    def attend_row(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
                   row: int) -> torch.Tensor:
        out: torch.Tensor = PackedCpuFlash.apply(q, k, v, sequences, row, self.softmax_scale)
        return out.flatten(1)


class VarlenAttention(PrefixLMAttention):
    """FlashAttention 2 inside torch, called twice for all rows."""

    bucketed = False  # see varlen_calls

    def __init__(self, config: TransformerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.primitive: Primitive = torch_varlen

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences) -> torch.Tensor:
        calls = sequences.once(varlen_calls, q.device, self.bucketed)
        return attend_in_calls(q, k, v, calls, self.primitive, self.softmax_scale)


class TransformerEngineAttention(VarlenAttention):
    """Transformer Engine's kernels, called twice for all rows."""

    # cuDNN before 9.6 builds a plan for each new number of sequences and maximum length; for later versions token
    # counts are rounded instead (DotProductAttention.forward, the note on max_seqlen). Empty sequences at the end and
    # larger bounds have no other effect.
    bucketed = True

    def __init__(self, config: TransformerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.primitive = TransformerEngineVarlen(config)


class FlashAttnAttention(VarlenAttention):
    """Kernels of the flash-attn package, called twice for all rows."""

    def __init__(self, config: TransformerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        deterministic = torch.are_deterministic_algorithms_enabled()
        found, reason = choose_generation(config.params_dtype, config.kv_channels, Machine.here(), deterministic)
        assert found, reason  # else `core_attention` has raised
        self.primitive = flash_varlen(found, deterministic)


KERNELS: dict[str, type[PrefixLMAttention]] = {
    "te": TransformerEngineAttention, "varlen": VarlenAttention, "flash": FlashAttnAttention, "sdpa": SdpaAttention,
    "cpu": CpuAttention, "dense": DenseAttention}


def kernel_of(kernel: str, dtype: torch.dtype, head_dim: int) -> str:
    """Return the name in KERNELS for `--attention-kernel`, queries of `dtype` and heads of `head_dim` on this
    machine."""
    return _choose(kernel, dtype, head_dim)[0]


def core_attention(kernel: str, dtype: torch.dtype, head_dim: int) -> type[PrefixLMAttention]:
    """Return the class that `kernel_of` names."""
    return KERNELS[kernel_of(kernel, dtype, head_dim)]


def explain_kernel(kernel: str, dtype: torch.dtype, head_dim: int) -> str:
    """Return one line that says which kernel `core_attention` takes and why."""
    return _choose(kernel, dtype, head_dim)[1]


def _choose(kernel: str, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    # Megatron's --deterministic-mode sets this in torch.
    return choose_kernel(kernel, dtype, head_dim, Machine.here(), torch.are_deterministic_algorithms_enabled())
