"""Transformer Engine's Python half on a CPU over tests/te/stub.py; run as a program by test_te.py.

    python -m tests.te.probe CAPABILITY

CAPABILITY is that of the pretended GPU, such as 9.0. Transformer Engine's pure Python package must be on PYTHONPATH.
Each line on stdin is a JSON list of processes to fork, each an object of its `words`, `environment` and `log`, and is
answered by their exit codes. `words` are claims, each a function here (and argument), or `train` and arguments of
hrm_megatron.pretrain; the last line of the log is what they returned, as JSON.
"""
from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

gc.disable()  # until all is imported

import torch  # noqa: E402

from hrm_megatron.parallel.cpu import activate  # noqa: E402

activate()

from tests.te import stub  # noqa: E402

major, minor = map(int, sys.argv[1].split("."))
stub.install((major, minor))

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from transformer_engine.common.recipe import DelayedScaling  # noqa: E402
from transformer_engine.pytorch import DotProductAttention, autocast  # noqa: E402
from transformer_engine.pytorch.constants import FP8FwdTensorIdx  # noqa: E402
from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # noqa: E402

from hrm_megatron.attention.te_attention import TransformerEngineVarlen  # noqa: E402
from hrm_megatron.attention.varlen import VarlenCall  # noqa: E402
from hrm_megatron.config import PRESETS, Architecture, ConfigError  # noqa: E402
from hrm_megatron.layers import te_linear  # noqa: E402
from hrm_megatron.model import hrm  # noqa: E402
from hrm_megatron.model.hrm import HRMModel  # noqa: E402
from hrm_megatron.parallel.connections import choose_connections  # noqa: E402
from hrm_megatron.parallel.patching import temporarily  # noqa: E402
from hrm_megatron.parallel.single import single_rank  # noqa: E402
from hrm_megatron.transformer_config import hrm_config  # noqa: E402
from tests.forked import run_and_exit  # noqa: E402
from tests.model.small import Sums  # noqa: E402
from tests.te.memory import kept, offloading  # noqa: E402
from tests.te.models import (  # noqa: E402
    ARCHITECTURE,
    FP8,
    LOCAL,
    TE,
    batches,
    build,
    furthest,
    gradients,
    with_main_grads,
)

ATTRIBUTES = ("tensor_model_parallel", "partition_dim", "partition_stride", "allreduce", "sequence_parallel")
MEMORY = {"kept": kept, "offloading": offloading}


def presets() -> dict[str, Any]:
    """Name, shape and dtype of every weight of both specs, in every width that has a preset, two layers deep."""
    found: dict[str, Any] = {}
    for preset, sizes in PRESETS.items():
        architecture = Architecture(2, sizes.hidden_size, sizes.num_attention_heads, sizes.ffn_hidden_size, 65_536)
        # The values are of no interest here, and a meta tensor has none.
        nothing = dict(initialize=lambda *_: None, draw=lambda *_: torch.zeros((), device="cpu"))
        with temporarily(hrm, **nothing), torch.device("meta"):
            for implementation in (LOCAL, TE):
                model = HRMModel(hrm_config(
                    architecture, transformer_impl=implementation, use_cpu_initialization=implementation == LOCAL,
                    init_model_with_meta_device=implementation == TE, params_dtype=torch.bfloat16), seed=1)
                found.setdefault(preset, []).append(
                    [[name, [*weight.shape], str(weight.dtype), weight.is_meta]
                     for name, weight in model.named_parameters()])
    return found


def spec() -> dict[str, Any]:
    """Everything beside shapes that a checkpoint, a layout or an optimizer asks of a weight."""
    found: dict[str, Any] = {}
    for implementation in (LOCAL, TE):
        model = build(implementation)
        found[implementation] = dict(
            classes=sorted({type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__}),
            attributes={name: [getattr(weight, a, None) for a in ATTRIBUTES]
                        for name, weight in model.named_parameters()},
            sums={name: weight.double().sum().item() for name, weight in model.named_parameters()},
            state=[*model.state_dict()],
            sharded={key: [type(part).__name__, part.key, getattr(part, "global_shape", None),
                           getattr(part, "global_offset", None)]
                     for key, part in model.sharded_state_dict().items()})
        whole = {key: value for key, value in model.state_dict().items() if not key.endswith("_extra_state")}
        model.load_state_dict(whole, strict=True)
    return found


def fp32() -> dict[str, float]:
    """Scores and gradients of both specs in fp32, where their sums differ in order only."""
    found = {}
    models = {name: build(name) for name in (LOCAL, TE)}
    batch = next(batches(1))
    with torch.no_grad():
        scores = {name: model(batch=batch)[0] for name, model in models.items()}
    found["scores"] = float((scores[LOCAL] - scores[TE]).abs().max())
    for bp_steps in (2, 3, 4, 5, 8):
        ours, theirs = ({n: g for n, g in gradients(build(name), bp_steps=bp_steps).items() if g is not None}
                        for name in (TE, LOCAL))
        assert ours.keys() == theirs.keys()
        found[f"gradients at bp {bp_steps}"] = furthest(ours, theirs)
    return found


def fused() -> dict[str, float]:
    """Gradients that the layers themselves add to main_grad, against autograd's sums; and those of stock layers."""
    found = {}
    fusion = dict(gradient_accumulation_fusion=True)
    for bp_steps in (2, 4, 5, 8):
        wanted = {n: g for n, g in gradients(build(LOCAL), bp_steps=bp_steps).items() if g is not None}
        ours = gradients(with_main_grads(build(TE, **fusion)), bp_steps=bp_steps)
        found[f"ours at bp {bp_steps}"] = furthest(ours, wanted)
    with temporarily(te_linear, TickSpecProvider=TESpecProvider):
        stock = gradients(with_main_grads(build(TE, **fusion)), bp_steps=5)
    wanted = gradients(build(LOCAL), bp_steps=5)
    found["stock at bp 5"] = furthest(stock, wanted)
    return found


def sums() -> dict[str, int]:
    """Whole gradients that autograd adds up in a backward through five ticks, with layers that add to main_grad."""
    found = {}
    for name, precision in (("bf16", FP8 | dict(fp8=None)), ("fp8", FP8 | dict(fp8_recipe="tensorwise"))):
        model = with_main_grads(build(TE, **precision))
        loss = model(batch=next(batches(1)), bp_steps=5)[0].sum()
        shapes = {weight.shape for key, weight in model.named_parameters()  # which no activation has
                  if key.endswith(("linear_qkv.weight", "linear_fc1.weight"))}
        with Sums(shapes, torch.bfloat16) as seen:
            loss.backward()
        found[name] = sum(seen.found.values())
    return found


def casts(recipe: str) -> dict[str, Any]:
    """Casts of each weight in each of three steps of two micro-batches, and how near FP8 stays to bf16."""
    model = with_main_grads(build(TE, fp8_recipe=recipe, **FP8))
    names = {weight.data_ptr(): name for name, weight in model.named_parameters()}
    steps = []
    for _ in range(3):
        stub.CAST_LOG.clear()
        for weight in model.parameters():
            weight.main_grad.zero_()
        got = gradients(model)
        steps.append(Counter(names[x.data_ptr()] for x in stub.CAST_LOG if x.data_ptr() in names))
    wanted = gradients(with_main_grads(build(TE, **{**FP8, "fp8": None})))
    cosine = min(torch.nn.functional.cosine_similarity(got[n].flatten(), wanted[n].flatten(), 0).item() for n in wanted)
    return dict(steps=steps, weights=[n for n in names.values() if "linear" in n], cosine=cosine)


def recast() -> float:
    """Scale a weight as an optimizer would: how far the next step's FP8 copy is from it, of its largest element."""
    model = with_main_grads(build(TE, fp8_recipe="tensorwise", **FP8))
    gradients(model)
    layer = model.h_stack.layers[1].mlp.linear_fc2
    with torch.no_grad():
        layer.weight.mul_(-3)
    gradients(model)
    return float((layer._fp8_workspaces["weight"].dequantize() - layer.weight).abs().max() / layer.weight.abs().max())


def layers_in_bf16() -> list[str]:
    """Which layers' weights were cast where the first one and the last one of each stack stay in bf16."""
    model = with_main_grads(build(
        TE, architecture=replace(ARCHITECTURE, num_layers=4), fp8_recipe="tensorwise", first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2, **FP8))
    names = {weight.data_ptr(): name for name, weight in model.named_parameters()}
    stub.CAST_LOG.clear()
    gradients(model)
    return sorted({names[x.data_ptr()].rpartition(".")[0].partition(".self_")[0].partition(".mlp")[0]
                   for x in stub.CAST_LOG if x.data_ptr() in names})


def checkpoints() -> dict[str, Any]:
    """Save under one spec and load under the other, all strictness there is: tensors that are not bitwise the same."""
    found: dict[str, Any] = {}
    for saved, loaded in ((LOCAL, TE), (TE, LOCAL)):
        with tempfile.TemporaryDirectory() as folder:
            source, target = build(saved, seed=1), build(loaded, seed=2)
            dist_checkpointing.save(source.sharded_state_dict(), folder)
            state = dist_checkpointing.load(target.sharded_state_dict(), folder, strict=StrictHandling.RAISE_ALL)
            target.load_state_dict(state, strict=True)
            ours, theirs = dict(source.named_parameters()), dict(target.named_parameters())
            found[f"{saved} to {loaded}"] = [n for n in ours if not torch.equal(ours[n], theirs[n])]
    return found


def delayed() -> dict[str, Any]:
    """What a checkpoint keeps of delayed scaling, after a resume and under another recipe."""
    model = with_main_grads(build(TE, fp8_recipe="delayed", fp8_amax_history_len=4, fp8_amax_compute_algo="max", **FP8))
    gradients(model)
    layer, found = "h_stack.layers.1.mlp.linear_fc2", {}
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(model.sharded_state_dict(), folder)
        for recipe, length in (("delayed", 4), ("delayed", 8), ("tensorwise", 4), (LOCAL, 4)):
            overrides = {} if recipe == LOCAL else dict(fp8_recipe=recipe, fp8_amax_history_len=length,
                                                        fp8_amax_compute_algo="max", **FP8)
            again = build(LOCAL if recipe == LOCAL else TE, seed=9, **overrides)
            state = dist_checkpointing.load(again.sharded_state_dict(), folder, strict=StrictHandling.RAISE_ALL)
            again.load_state_dict(state, strict=True)
            if recipe == "delayed":
                ours, theirs = (m.get_submodule(layer).get_extra_state() for m in (again, model))
                found[f"{recipe} {length}"] = {name: bool(ours[name].shape == theirs[name].shape
                                                          and torch.equal(ours[name], theirs[name])) for name in theirs}
            else:
                found[recipe] = again.get_submodule(layer).get_extra_state()
        scales = model.get_submodule(layer).get_extra_state()
        # One step further from both: the resumed run must score as the one that never stopped.
        again = with_main_grads(build(TE, seed=9, fp8_recipe="delayed", fp8_amax_history_len=4,
                                      fp8_amax_compute_algo="max", **FP8))
        again.load_state_dict(dist_checkpointing.load(again.sharded_state_dict(), folder), strict=True)
        batch = next(batches(1))
        for part in (model, again):
            part.set_is_first_microbatch()
        found["scores after"] = float((model(batch=batch)[0] - again(batch=batch)[0]).abs().max())
    found["scale"] = scales["scaling_fwd.scale"].tolist()
    return found


def attention() -> dict[str, Any]:
    """What attention's modules add to the exchange of maxima by each kind of call, in a region of FP8 and out of it;
    and whether the region goes on behind them."""
    def forward(self: Any, q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.prepare_forward(q, num_gemms=3, allow_non_contiguous=True)
        self.end_forward()
        return q

    config, found = hrm_config(ARCHITECTURE, **FP8), {}
    q, bounds = torch.zeros(8, 4, 16, dtype=torch.bfloat16), torch.tensor([0, 8], dtype=torch.int32)
    for name, region in (("as it is", None), ("in the region", contextlib.nullcontext)):
        FP8GlobalStateManager.reset()
        varlen = TransformerEngineVarlen(config)
        varlen.region = region or varlen.region
        with mock.patch.object(DotProductAttention, "forward", forward), torch.no_grad(), autocast(
                enabled=True, recipe=DelayedScaling()):
            sizes = []
            for causal in (True, False):
                varlen(q, q, q, VarlenCall(None, None, bounds, bounds, 8, 8, causal), None)
                buffers = FP8GlobalStateManager.quantization_state.global_amax_buffer.values()
                sizes.append(sum(tensor.numel() for buffer in buffers for tensor in buffer))
            found[name] = [*sizes, FP8GlobalStateManager.is_fp8_enabled()]
    return found


def no_backend() -> str:
    """What attention says where the one backend that is asked for is not there, as none is on a CPU."""
    varlen = TransformerEngineVarlen(hrm_config(ARCHITECTURE, attention_backend=AttnBackend.fused))
    q, bounds = torch.zeros(8, 4, 16, dtype=torch.bfloat16), torch.tensor([0, 8], dtype=torch.int32)
    variables = dict.fromkeys(("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"), "0")
    with mock.patch.dict(os.environ, variables):
        try:
            varlen(q, q, q, VarlenCall(None, None, bounds, bounds, 8, 8, True), None)
        except ConfigError as error:
            return str(error)
    return "none"


def fp8_parameters() -> dict[str, float]:
    """What FP8 parameters hold after initialization, and what their masters would begin with."""
    plain = dict(build(TE, params_dtype=torch.bfloat16, bf16=True).named_parameters())
    found = SimpleNamespace(weight=0.0, master=0.0, count=0)
    for name, weight in build(TE, fp8_recipe="tensorwise", fp8_param=True, **FP8).named_parameters():
        if hasattr(weight, "get_high_precision_init_val"):
            found.count += 1
            want = plain[name]
            found.weight = max(found.weight, float((weight.dequantize() - want).abs().max() / want.abs().max()))
            found.master = max(found.master, float((weight.get_high_precision_init_val() - want).abs().max()))
    return vars(found)


def first_amax() -> dict[str, list[float]]:
    """Largest value that each FP8 parameter's scale will follow, and its own, where memory begins with anything."""
    stock = torch.empty

    def empty(*arguments: Any, **options: Any) -> torch.Tensor:
        memory = stock(*arguments, **options)
        return memory.fill_(1e4) if memory.is_floating_point() else memory
    with temporarily(torch, empty=empty):
        model = build(TE, fp8_recipe="delayed", fp8_param=True, **FP8)
    return {name: [layer.fp8_meta["scaling_fwd"].amax_history[:, FP8FwdTensorIdx.GEMM1_WEIGHT].max().item(),
                   layer.weight.get_high_precision_init_val().abs().max().item()]
            for name, layer in model.named_modules() if isinstance(layer, te_linear.TickLinear)}


def train(*arguments: str) -> dict[str, Any]:
    """Run hrm_megatron.pretrain as this rank: how often it cast each weight that it cast, in each step, and how many
    contexts it made for offloading."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.training import training
    from transformer_engine.pytorch import cpu_offload

    from hrm_megatron import pretrain

    coalesced = param_and_grad_buffer._coalescing_manager

    def one_by_one(group: Any, async_ops: bool = False) -> Any:
        return coalesced(group, async_ops=True) if async_ops else contextlib.nullcontext()
    # gloo sends coalesced tensors through one dtype: bytes of FP8 weights beside bf16 ones come out as numbers.
    param_and_grad_buffer._coalescing_manager = one_by_one
    steps: list[list[int]] = []
    stock = training.train_step

    def train_step(forward_step: Any, data: Any, model: list[torch.nn.Module], *rest: Any, **options: Any) -> Any:
        weights = {w.data_ptr() for part in model for w in part.parameters()}
        stub.CAST_LOG.clear()
        done = stock(forward_step, data, model, *rest, **options)
        counted = Counter(x.data_ptr() for x in stub.CAST_LOG if x.data_ptr() in weights)
        steps.append(sorted(counted.values()))
        return done
    training.train_step = train_step
    sys.argv = ["pretrain", *arguments]
    choose_connections(arguments)  # pretrain was imported before these were known
    stock_context = cpu_offload.DefaultOffloadSynchronizer
    with mock.patch.object(cpu_offload, "DefaultOffloadSynchronizer", wraps=stock_context) as made:
        pretrain.run(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return dict(casts=steps, contexts=made.call_count)


def answer(words: list[str]) -> dict[str, Any]:
    """What one process has to say."""
    if words[0] == "train":
        return train(*words[1:])
    answers = {}
    with single_rank():
        for claim in words:
            FP8GlobalStateManager.reset()
            name, *arguments = claim.split()
            answers[claim] = (MEMORY.get(name) or globals()[name])(*arguments)
    return answers


def forked(words: list[str], environment: dict[str, str], log: str) -> int:
    """Start a process that answers, and return its number."""
    if number := os.fork():
        return number

    def work() -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        print(json.dumps(answer(words)))
    run_and_exit(work)


def main() -> None:
    importlib.import_module("hrm_megatron.pretrain")
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        processes = [forked(**process) for process in json.loads(line)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in processes]), flush=True)


if __name__ == "__main__":
    main()
