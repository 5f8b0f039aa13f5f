"""Which attention kernel a run takes, as a table: facts in, kernel and reason out."""
import re
from dataclasses import replace

import pytest
import torch

from hrm_megatron.attention.kernel_choice import WHAT, choose_kernel
from hrm_megatron.config import ConfigError
from hrm_megatron.parallel.flash_attn import FlashAttn
from hrm_megatron.parallel.machine import INSTALL_TE, Machine

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CPU = Machine()
BARE = Machine((9, 0))
H100, A100, L40, B200 = (Machine(capability, transformer_engine="2.16.1")
                         for capability in ((9, 0), (8, 0), (8, 9), (10, 0)))
T4 = Machine((7, 5), transformer_engine="2.16.1")
OLD = Machine((9, 0), transformer_engine="2.1")
WITHOUT_FLASH = Machine((9, 0), flash=False)
FA2, FA3, FA4 = (FlashAttn(*found) for found in ((2, "2.8.3"), (3, "3.0.0"), (4, "4.0.0b36")))
NO_FLASH = "not flash: flash-attn is not installed (docs/gpu.md says how)"
NOT_INSTALLED = f"Transformer Engine is not installed ({INSTALL_TE})"
NO_TE = f"not te: {NOT_INSTALLED}"
NO_TE_BEFORE_HOPPER = "not te: it needs a GPU of compute capability 9.0 or more, and this one has {}"
WIDE = "it takes bf16 and fp16, not float32"
OTHER_SIZE = "it takes heads of a multiple of 8 up to {}, not {}"


@pytest.mark.parametrize(("asked", "dtype", "head_dim", "facts", "kernel", "why"), [
    ("auto", FP32, 64, CPU, "cpu", "the fastest that runs here"),
    ("auto", BF16, 64, CPU, "cpu", "the fastest that runs here"),
    ("auto", BF16, 128, H100, "te", f"the fastest that runs here; {NO_FLASH}"),
    ("auto", FP16, 128, A100, "varlen", f"the fastest that runs here; {NO_TE_BEFORE_HOPPER.format('8.0')}"),
    ("auto", BF16, 128, L40, "varlen", f"the fastest that runs here; {NO_TE_BEFORE_HOPPER.format('8.9')}"),
    ("auto", BF16, 128, replace(A100, flash_attn=(FA2,)), "varlen", NO_TE_BEFORE_HOPPER.format("8.0")),
    ("auto", BF16, 128, B200, "te", "the fastest that runs here"),
    ("auto", BF16, 128, BARE, "varlen", f"the fastest that runs here; {NO_FLASH}; {NO_TE}"),
    ("auto", BF16, 256, H100, "te", f"the fastest that runs here; {NO_FLASH}"),
    ("auto", BF16, 256, A100, "varlen", NO_TE_BEFORE_HOPPER.format("8.0")),
    ("auto", BF16, 192, B200, "varlen", f"not te: {OTHER_SIZE.format(128, 192)}; {NO_FLASH}"),
    ("auto", BF16, 128, replace(H100, flash_attn=(FA2, FA3)), "flash", "the fastest that runs here"),
    ("auto", BF16, 128, replace(H100, flash_attn=(FA2,)), "te", "the fastest that runs here"),
    ("auto", BF16, 128, replace(H100, flash_attn=(FA4,)), "te", "the fastest that runs here"),
    ("auto", BF16, 128, replace(BARE, flash_attn=(FA2,)), "varlen", f"the fastest that runs here; {NO_TE}"),
    ("auto", BF16, 128, replace(BARE, flash_attn=(FA4,)), "flash", f"the fastest that runs here; {NO_TE}"),
    ("auto", BF16, 128, replace(B200, flash_attn=(FA2, FA4)), "te", "the fastest that runs here"),
    ("auto", BF16, 64, replace(WITHOUT_FLASH, flash_attn=(FA2,)), "flash",
     f"{NO_TE}; not varlen: this torch was built without FlashAttention"),
    ("flash", BF16, 64, replace(A100, flash_attn=(FA2,)), "flash", "as asked"),
    ("auto", BF16, 264, H100, "sdpa", f"not varlen: {OTHER_SIZE.format(256, 264)}"),
    ("auto", BF16, 20, BARE, "sdpa", f"{NO_TE}; not varlen: {OTHER_SIZE.format(256, 20)}"),
    ("auto", FP32, 128, H100, "sdpa", f"not te: {WIDE}; not varlen: {WIDE}"),
    ("auto", FP16, 64, T4, "sdpa", "it needs a GPU of compute capability 8.0 or more, and this one has 7.5"),
    ("auto", BF16, 64, WITHOUT_FLASH, "sdpa", f"{NO_TE}; not varlen: this torch was built without FlashAttention"),
    ("auto", BF16, 128, OLD, "varlen", f"not te: Transformer Engine 2.1 is older than 2.2 ({INSTALL_TE})"),
    ("varlen", BF16, 128, H100, "varlen", "as asked"),
    ("te", BF16, 128, H100, "te", "as asked"),
    ("sdpa", BF16, 128, H100, "sdpa", "as asked"),
    ("dense", FP32, 20, H100, "dense", "as asked"),
    ("dense", FP32, 20, CPU, "dense", "as asked"),
    ("sdpa", FP32, 20, CPU, "sdpa", "as asked"),
    ("cpu", FP32, 20, CPU, "cpu", "as asked"),
])
def test_the_choice(asked, dtype, head_dim, facts, kernel, why):
    found, line = choose_kernel(asked, dtype, head_dim, facts)
    what = re.escape(WHAT[kernel]) if kernel != "flash" else r"flash-attn(-\d)? [\d.b]+, two calls over all rows"
    assert found == kernel and re.match(rf"{kernel} \({what}\), ", line) and line.endswith(why)


@pytest.mark.parametrize(("asked", "dtype", "head_dim", "facts", "line"), [
    ("varlen", FP32, 128, BARE, f"{WIDE}; --attention-kernel sdpa works here"),
    ("te", FP32, 128, H100, f"{WIDE}; --attention-kernel sdpa works here"),
    ("te", BF16, 128, BARE, f"{NOT_INSTALLED}; --attention-kernel varlen works here"),
    ("te", BF16, 256, B200, f"{OTHER_SIZE.format(128, 256)}; --attention-kernel varlen works here"),
    ("te", BF16, 128, A100, f"{NO_TE_BEFORE_HOPPER.format('8.0')[8:]}; --attention-kernel varlen works here"),
    ("varlen", BF16, 20, H100, f"{OTHER_SIZE.format(256, 20)}; --attention-kernel sdpa works here"),
    ("varlen", FP16, 64, T4,
     "it needs a GPU of compute capability 8.0 or more, and this one has 7.5; --attention-kernel sdpa works here"),
    ("varlen", BF16, 64, WITHOUT_FLASH,
     "this torch was built without FlashAttention; --attention-kernel sdpa works here"),
    ("varlen", BF16, 64, CPU, "it needs a CUDA device, and there is none; --attention-kernel cpu works here"),
    ("te", BF16, 64, CPU, "it needs a CUDA device, and there is none; --attention-kernel cpu works here"),
    ("cpu", BF16, 64, H100,
     "it needs a model on a CPU, and models live on the GPU here; --attention-kernel te works here"),
    ("flash", BF16, 64, CPU, "it needs a CUDA device, and there is none; --attention-kernel cpu works here"),
    ("flash", FP32, 64, replace(H100, flash_attn=(FA3,)), f"{WIDE}; --attention-kernel sdpa works here"),
    ("flash", BF16, 260, replace(H100, flash_attn=(FA3,)),
     f"{OTHER_SIZE.format(256, 260)}; --attention-kernel sdpa works here"),
])
def test_a_kernel_that_cannot_run_names_one_that_can(asked, dtype, head_dim, facts, line):
    with pytest.raises(ConfigError) as caught:
        choose_kernel(asked, dtype, head_dim, facts)
    assert str(caught.value) == f"--attention-kernel {asked}: {line}"


def test_an_unknown_kernel_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match="attention_kernel='flesh': choose one of auto, te, varlen, flash, sdpa, "
                                          "cpu, dense"):
        choose_kernel("flesh", BF16, 64, H100)


def test_the_door_has_a_class_for_every_name(single_rank):
    from hrm_megatron.attention.core import KERNELS, core_attention, explain_kernel

    assert list(KERNELS) == list(WHAT)
    if not torch.cuda.is_available():
        assert core_attention("auto", BF16, 64) is KERNELS["cpu"]
        assert explain_kernel("auto", BF16, 64).startswith("cpu (torch's CPU flash kernel")
        with pytest.raises(ConfigError, match="no|none"):
            core_attention("varlen", BF16, 64)
