"""What layers keep for backward, on the device and in the host's memory: claims of tests/te/probe.py."""
from __future__ import annotations

import contextlib
import gc
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.extensions.transformer_engine import get_cpu_offload_context

from hrm_megatron.attention.core import VarlenAttention
from hrm_megatron.attention.varlen import torch_varlen
from hrm_megatron.config import PRESETS, Architecture
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.layers.functions import gated
from hrm_megatron.model import hrm
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.parallel.patching import temporarily
from tests.attention.stand_ins import flash_attention_in_torch
from tests.model.small import kept_bytes
from tests.te import stub
from tests.te.models import ARCHITECTURE, FP8, TE, build, furthest, gradients, with_main_grads


def with_one_context(block: Any, layers: int) -> Any:
    """What the constructor of Megatron's TransformerBlock does: one context for all its calls."""
    if isinstance(block.offload_context, contextlib.nullcontext):
        block.offload_context, block.group_prefetch_offload_commit_async = get_cpu_offload_context(
            True, layers, len(block.layers), True, False, False, False)
    return block


# bp and recomputed ticks. Which ticks keep what does not depend on the precision: FP8 repeats the ends.
OFFLOADED = {"fp32": ((2, 0), (3, 0), (5, 0), (5, 2), (8, 0)), "fp8": ((2, 0), (5, 2))}


def offloading(precision: str) -> dict[str, Any]:
    """Gradients of two micro-batches with activations in another place, against those without; what was copied there;
    and what becomes of it under Megatron's one context for each stack."""
    from transformer_engine.pytorch import cpu_offload

    options: dict[str, Any] = dict(gradient_accumulation_fusion=True, architecture=replace(ARCHITECTURE, num_layers=4))
    if precision == "fp8":
        options |= FP8 | dict(fp8_recipe="tensorwise")
    state, copied, contexts = cpu_offload.OffloadableLayerState, [], []
    start, begin = state.start_offload, cpu_offload.OffloadSynchronizer.__init__

    def start_offload(self: Any) -> None:
        start(self)
        copied.extend(x.detach() for x in self.fwd_gpu_tensor_group.tensor_list)

    def remember(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        contexts.append(weakref.ref(self))

    def build_on(layers: int, recompute_ticks: int = 0) -> HRMModel:
        copied.clear()
        return with_main_grads(build(TE, cpu_offloading=layers > 0, cpu_offloading_num_layers=layers,
                                     recompute_ticks=recompute_ticks, **options))
    found: dict[str, Any] = dict(differ=[], bytes={}, foreign=0)
    # Its own choice asks for a CUDA tensor of 2^18 elements; here the smallest that counts is a rotation table.
    chosen = dict(_check_if_offload=lambda self, t: t.numel() >= 2 ** 10 and t.is_contiguous() and not (
        isinstance(t, torch.nn.Parameter) or getattr(t, "_TE_do_not_offload", False)), start_offload=start_offload)
    with temporarily(state, **chosen), temporarily(cpu_offload.OffloadSynchronizer, __init__=remember):
        for bp_steps, ticks in OFFLOADED[precision]:
            wanted = gradients(build_on(0), bp_steps=bp_steps)
            for layers in (1, 2, 3):
                model = build_on(layers, ticks)
                have = gradients(model, bp_steps=bp_steps)
                found["differ"] += [n for n, w in wanted.items() if w is not None and not torch.equal(have[n], w)]
                found["bytes"][f"{bp_steps} {ticks} {layers}"] = sum(x.nbytes for x in copied)
                weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
                tables = (1, 1)  # of rotation: [s, b, 1, d]
                found["foreign"] += sum(x.shape[1:3] == tables or x.untyped_storage().data_ptr() in weights
                                        for x in copied)
        stub.CAST_LOG.clear()  # what it holds has a graph
        gc.collect()
        found["contexts"] = [len(contexts), sum(context() is not None for context in contexts)]
        with temporarily(hrm, offloaded=with_one_context):
            try:
                have = gradients(build_on(1), bp_steps=5)
                found["one context"] = furthest(have, wanted)
            except RuntimeError as error:
                found["one context"] = str(error)
    return found


class CompiledGate(torch.autograd.Function):
    """Keep of the output gate what torch.compile keeps: both inputs as they are."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, gate)
        return gated(x, gate)


def kept() -> dict[str, float]:
    """What a layer of preset XL keeps of each position of a full row in bf16, with what GPUs use, in states of it."""
    sizes = PRESETS["XL"]
    architecture = Architecture(1, sizes.hidden_size, sizes.num_attention_heads, sizes.ffn_hidden_size, 512)
    generator, total = np.random.default_rng(0), 2048
    cuts = [0, *np.cumsum(generator.integers(128, 512, 5)), total]
    examples = [(np.ones(p, np.int64), np.ones(n - p + 1, np.int64))
                for n, p in zip(np.diff(cuts), generator.integers(64, 128, 6), strict=True)]
    batch = PackedBatch.from_rows({k: t[None] for k, t in assemble_row(examples, total).items()})
    found, state = {}, total * sizes.hidden_size * 2
    for dropped in (False, True):
        model = build(TE, architecture=architecture, params_dtype=torch.bfloat16, bf16=True,
                      recompute_gated_act=dropped, bias_activation_fusion=not dropped, use_te_activation_func=dropped)
        layer, sequences = model.l_stack.layers[0], model.sequences(batch)
        core = layer.self_attention.core_attention
        core.__class__, core.primitive = VarlenAttention, torch_varlen  # refused for a model on a CPU
        if not dropped:
            layer.self_attention._apply_output_gate = lambda x, gate: CompiledGate.apply(x, gate.view(x.shape))
        x = torch.randn(total, 1, sizes.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        shared = [*model.parameters(), *vars(sequences.rotation).values()]
        with flash_attention_in_torch():
            found[str(dropped)] = kept_bytes(partial(layer_output, layer, x, sequences), shared) / state
    return found


def layer_output(layer: torch.nn.Module, x: torch.Tensor, sequences: Any) -> torch.Tensor:
    out: torch.Tensor = layer(hidden_states=x, attention_mask=None, packed_seq_params=sequences)[0]
    return out
