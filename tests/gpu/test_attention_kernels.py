"""Every attention kernel for GPUs against the dense definition in bf16, and what a run relies on beside its values.

Where there is no GPU the same tests run on a CPU, with stand-ins for the libraries.
"""
import contextlib
import random
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from hrm_megatron.config import Architecture
from tests.attention import stand_ins

FLASH_ATTN = {"flash-3": (3, "3.0.0"), "flash-2": (2, "2.8.3.post2"), "flash-4": (4, "4.0.0b36")}
KERNELS = ("sdpa", "varlen", "te", *FLASH_ATTN)
STAND_INS = {"varlen": stand_ins.flash_attention_in_torch, "te": stand_ins.transformer_engine,
             **{name: partial(stand_ins.flash_attn, *which) for name, which in FLASH_ATTN.items()}}
HEADS, ROWS, ROW_TOKENS = 3, 2, 384


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("models live on the GPU where there is one")
    return request.param


@contextlib.contextmanager
def installed(name, deterministic=False):
    """The library behind a kernel for GPUs, of flash-attn this one generation; skips the test where it is not there."""
    if name == "te":
        pytest.importorskip("transformer_engine.pytorch")
    if name not in FLASH_ATTN:
        yield
        return
    from hrm_megatron.attention.flash import choose_generation
    from hrm_megatron.parallel.machine import Machine

    here = Machine.here()
    machine = replace(here, flash_attn=tuple(one for one in here.flash_attn if one.generation == FLASH_ATTN[name][0]))
    found, reason = choose_generation(torch.bfloat16, 128, machine, deterministic)
    if not found:
        pytest.skip(f"{name}: {reason}")
    with mock.patch.object(Machine, "here", return_value=machine):
        yield


@pytest.fixture(params=KERNELS)
def kernel(request, device, single_rank):
    deterministic = "deterministic" in request.node.name
    with (installed(request.param, deterministic) if device == "cuda"
          else STAND_INS.get(request.param, contextlib.nullcontext)()):
        yield request.param


def lengths_of_rows():
    """Rows of short and long examples, of empty responses and of one-token prefixes, and some padding."""
    draw, rows = random.Random(7), []
    for _ in range(ROWS):
        left, pairs = ROW_TOKENS - 5, []
        while left > 40:
            p, r = draw.choice((1, 7, 130)), draw.choice((0, 1, 64, 90))
            p = min(p, left)
            pairs.append((p, min(r, left - p)))
            left -= sum(pairs[-1])
        rows.append(pairs)
    return rows


def tensors(head_dim, device):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(ROW_TOKENS, ROWS, HEADS, head_dim, generator=generator).to(device, torch.bfloat16)
            for _ in range(4)]


def build(name, head_dim):
    from hrm_megatron.attention.core import KERNELS
    from hrm_megatron.transformer_config import hrm_config

    config = hrm_config(Architecture(1, HEADS * head_dim, HEADS, 16, 250), bf16=True, params_dtype=torch.bfloat16)
    return KERNELS[name.split("-")[0]](config, layer_number=1, attn_mask_type=None, attention_type="self")


def sequences_on(device, head_dim):
    from hrm_megatron.attention.prefix_lm import PrefixSequences
    from hrm_megatron.attention.rotary import Rotation

    positions = torch.arange(ROW_TOKENS).expand(ROWS, -1).to(device)
    return PrefixSequences(lengths_of_rows(), Rotation.of(positions, head_dim, 1e4), ROW_TOKENS)


def outputs_and_gradients(attention, inputs, sequences):
    *inputs, probe = inputs
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = attention(*leaves, packed_seq_params=sequences)
    return [out.detach(), *torch.autograd.grad(out, leaves, probe.flatten(2))]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bf16_equals_the_definition(single_rank, parity, device, kernel, head_dim):
    """The definition rounds only its results to bf16, 2^-9 each; a kernel rounds softmax weights and their gradients
    too, and keys get the sum of two rounded gradients. A mask shifted by one key is off by 0.15 and more."""
    inputs = tensors(head_dim, device)
    have, want = (outputs_and_gradients(build(name, head_dim), inputs, sequences_on(device, head_dim))
                  for name in (kernel, "dense"))
    assert all(t.dtype == torch.bfloat16 and t.device.type == device for t in have)
    for what, a, b in zip(("output", "dq", "dk", "dv"), have, want, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        parity(f"{kernel} in bf16 on {device}, heads of {head_dim}: {what}", error.item(), 1e-2)
        assert (a - b).abs().max() < 3e-2 * b.abs().max()  # no single position is far off


def test_deterministic_kernels_repeat_bitwise(single_rank, monkeypatch, device, kernel):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with the two above: Megatron's --deterministic-mode
    try:
        attention, inputs = build(kernel, 64), tensors(64, device)
        runs = [outputs_and_gradients(attention, inputs, sequences_on(device, 64)) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "sdpa"])
def test_the_host_never_waits_for_the_device(single_rank, name):
    with installed(name):
        attention = build(name, 64)
    inputs = tensors(64, "cuda")
    want = outputs_and_gradients(attention, inputs, sequences_on("cuda", 64))  # compiles, and makes plans
    sequences = sequences_on("cuda", 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        have = outputs_and_gradients(attention, inputs, sequences)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (have[0] - want[0]).abs().max() == 0
