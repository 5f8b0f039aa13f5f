"""What GPU libraries do in attention, in plain torch on a CPU, with the demands that they make of their callers.

Written from their documents, not from hrm_megatron: each sequence goes through scaled_dot_product_attention with its
mask written out.
"""
from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F


def _sequences(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    """Attend sequence by sequence, the causal mask at the bottom right: [tq, heads, d]."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    outputs = [q[:0]]
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        assert b - a <= max_q and d - c <= max_k and (not causal or b - a <= d - c)
        if a < b:
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a)) if causal else None
            outputs.append(F.scaled_dot_product_attention(
                *(t.transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d])), attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(outputs)


def _check_flash(q, k, v, dropout, is_causal, left, right):
    # aten/native/transformers/cuda/flash_attn/flash_api.cpp, mha_varlen_fwd
    assert q.dim() == k.dim() == v.dim() == 3 and q.shape[1:] == k.shape[1:] == v.shape[1:] and k.shape == v.shape
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    assert dropout == 0 and (left, right) == ((-1, 0) if is_causal else (-1, -1))


def _flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, debug, *, scale=None, window_size_left=None,
                   window_size_right=None, seqused_k=None, alibi_slopes=None):
    _check_flash(q, k, v, dropout, is_causal, window_size_left, window_size_right)
    out = _sequences(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale)
    return (out, q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64),
            torch.zeros(0, dtype=torch.uint64), q.new_zeros(0))


def _flash_backward(grad, q, k, v, out, log_sums, cu_q, cu_k, max_q, max_k, dropout, is_causal, rng, unused, *,
                    scale=None, window_size_left=None, window_size_right=None):
    _check_flash(q, k, v, dropout, is_causal, window_size_left, window_size_right)
    scale = scale or q.shape[-1] ** -0.5
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1) & is_causal
        scores = torch.einsum("ihd,jhd->hij", q[a:b], k[c:d]) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        d_weights = torch.einsum("ihd,jhd->hij", grad[a:b], v[c:d])
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
        dq[a:b] = torch.einsum("hij,jhd->ihd", d_scores, k[c:d])
        dk[c:d] = torch.einsum("hij,ihd->jhd", d_scores, q[a:b])
        dv[c:d] = torch.einsum("hij,ihd->jhd", weights, grad[a:b])
    return dq, dk, dv


@contextmanager
def flash_attention_in_torch() -> Iterator[None]:
    """Give the CPU the two operators that torch.nn.attention.varlen calls."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _flash_forward, "CPU")
    library.impl("_flash_attention_backward", _flash_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


class DotProductAttention(torch.nn.Module):
    """Transformer Engine's, for qkv_format "thd" (pytorch/attention/dot_product_attention/dot_product_attention.py)."""

    fused = True  # whether it finds a fused kernel
    built: list[DotProductAttention] = []

    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
                 attn_mask_type="causal", attention_type="self", softmax_scale=None):
        super().__init__()
        self.shape, self.mask, self.scale = (num_attention_heads, kv_channels), attn_mask_type, softmax_scale
        assert qkv_format == "thd" and attention_type in ("self", "cross") and attention_dropout == 0
        assert attn_mask_type in ("padding", "padding_causal_bottom_right")
        self.unfused_attention = torch.nn.Identity()
        self.bounds = set()
        self.built.append(self)

    def get_extra_state(self):
        return torch.zeros(1)

    def forward(self, query_layer, key_layer, value_layer, cu_seqlens_q=None, cu_seqlens_kv=None, max_seqlen_q=None,
                max_seqlen_kv=None):
        assert query_layer.shape[1:] == key_layer.shape[1:] == value_layer.shape[1:] == self.shape
        assert max_seqlen_q and max_seqlen_kv  # else it asks the device
        self.bounds.add((len(cu_seqlens_q) - 1, max_seqlen_q, max_seqlen_kv))
        if not self.fused:
            return self.unfused_attention(query_layer, key_layer, value_layer)
        return _sequences(query_layer, key_layer, value_layer, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv,
                          self.mask == "padding_causal_bottom_right", self.scale).flatten(1)


@contextmanager
def transformer_engine(fused: bool = True) -> Iterator[type[DotProductAttention]]:
    """Let `transformer_engine.pytorch` have this DotProductAttention."""
    package, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    found = type("DotProductAttention", (DotProductAttention,), dict(fused=fused, built=[]))
    package.pytorch, pytorch.DotProductAttention = pytorch, found
    with mock.patch.dict(sys.modules, {"transformer_engine": package, "transformer_engine.pytorch": pytorch}):
        yield found


# flash-attn: generation and version > the parameters of flash_attn_varlen_func, in their order.
FLASH_ATTN = {
    (2, "2.8.3.post2"):
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size softcap "
        "alibi_slopes deterministic return_attn_probs block_table",
    (3, "3.0.0b1"):  # hopper/flash_attn_interface.py in the source archive of 2.8.3
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k softmax_scale causal qv "
        "q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa deterministic sm_margin",
    (3, "3.0.0"):
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k softmax_scale causal qv "
        "q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa deterministic sm_margin "
        "return_attn_probs",
    (4, "4.0.0b20"):
        "q k v qv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k min_seqlen_k seqused_q seqused_k "
        "gather_kv_indices page_table softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa "
        "deterministic score_mod score_mod_bwd mask_mod block_sparse_tensors aux_tensors aux_scalars return_lse",
    (4, "4.0.0b36"):
        "q k v qv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k min_seqlen_k seqused_q seqused_k "
        "gather_kv_indices page_table softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa "
        "deterministic score_mod score_mod_bwd mask_mod block_sparse_tensors aux_tensors aux_scalars return_lse "
        "scheduler_metadata seqlen_k_per_split disable_scheduler_metadata gather_bwd_recompute_p "
        "gather_bwd_token_chunk",
}
FLASH_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
ASKED_FOR = {"softmax_scale", "causal", "deterministic", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}


def flash_attn_varlen_func(generation, version, dtypes, seen):
    """Make the function of that version; it notes in `seen` what it was given beside tensors."""
    signature = inspect.Signature([
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD,
                          default=inspect.Parameter.empty if i < 3 else None)
        for i, name in enumerate(FLASH_ATTN[generation, version].split())])

    def function(*arguments, **options):
        given = signature.bind(*arguments, **options).arguments
        q, k, v = (given.pop(name) for name in "qkv")
        assert set(given) <= ASKED_FOR and {type(given["max_seqlen_q"]), type(given["max_seqlen_k"])} == {int}
        # csrc/flash_attn/flash_api.cpp, mha_varlen_fwd; hopper/flash_api.cpp, mha_fwd; cute/interface.py,
        # _flash_attn_fwd
        assert q.dtype == k.dtype == v.dtype and q.dtype in dtypes
        assert q.dim() == k.dim() == v.dim() == 3 and q.shape[1:] == k.shape[1:] == v.shape[1:] and k.shape == v.shape
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.shape[-1] % 8 == 0
        cu_q, cu_k = given["cu_seqlens_q"], given["cu_seqlens_k"]
        assert cu_q.is_contiguous() and cu_k.is_contiguous() and len(cu_q) > 1
        # Versions differ in what a sequence without queries or keys gives; there is none here.
        assert (cu_q.diff() > 0).all() and (cu_k.diff() > 0).all()
        out = _sequences(q, k, v, cu_q, cu_k, given["max_seqlen_q"], given["max_seqlen_k"], bool(given.get("causal")),
                         given.get("softmax_scale"))
        seen.append({name: value for name, value in given.items() if not isinstance(value, torch.Tensor)})
        return (out, None) if generation == 4 else out
    function.__signature__ = signature
    return function


@contextmanager
def flash_attn(generation: int, version: str, capability: tuple[int, int] = (9, 0),
               dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)) -> Iterator[list[dict[str, object]]]:
    """Install this flash-attn, alone, on a machine of that compute capability: yields what calls were given."""
    from hrm_megatron.parallel.flash_attn import FlashAttn
    from hrm_megatron.parallel.machine import Machine

    seen: list[dict[str, object]] = []
    name = FLASH_MODULES[generation]
    module = types.ModuleType(name)
    module.flash_attn_varlen_func = flash_attn_varlen_func(generation, version, dtypes, seen)
    machine = Machine(capability, flash_attn=(FlashAttn(generation, version, name),))
    modules = {name.split(".")[0]: types.ModuleType(name), name: module}
    with mock.patch.dict(sys.modules, modules), mock.patch.object(Machine, "here", return_value=machine):
        yield seen
