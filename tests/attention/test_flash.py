"""flash-attn: what is found of it, which generation a run takes, how its function is called."""
import functools
import inspect
import sys

import pytest
import torch

from hrm_megatron.attention.flash import GENERATIONS, choose_generation, reaches
from hrm_megatron.attention.kernel_choice import choose_kernel
from hrm_megatron.attention.prefix_lm import PrefixSequences
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.parallel import flash_attn as parallel_flash_attn
from hrm_megatron.parallel.flash_attn import NAMES, PACKAGES, FlashAttn, find, installed_flash_attn
from hrm_megatron.parallel.machine import Machine
from tests.attention import stand_ins
from tests.attention.test_varlen import (
    HEADS,
    PACKINGS,
    ROW_TOKENS,
    D,
    attention,
    difference,
    outputs_and_gradients,
    packing,
)

BF16, FP16 = torch.bfloat16, torch.float16
A100, H100, B200, RTX = (8, 0), (9, 0), (10, 0), (12, 0)
FA2, FA3, FA4 = (FlashAttn(generation, version, stand_ins.FLASH_MODULES[generation])
                 for generation, version in ((2, "2.8.3.post2"), (3, "3.0.0"), (4, "4.0.0b36")))
BETA = FlashAttn(3, "3.0.0b1", "flash_attn_interface")
ALL = (FA2, FA3, FA4)


def without(*names):
    return FlashAttn(3, "3.0.0", "flash_attn_interface", left_out=frozenset(names))


@pytest.mark.parametrize(("capability", "installed", "taken"), [
    (A100, ALL, FA2), (H100, ALL, FA3), (B200, ALL, FA4), (RTX, ALL, FA2),
    (H100, (FA4, FA2), FA2), (H100, (FA4,), FA4), (B200, (FA2, FA3), FA2), ((8, 9), (FA2,), FA2), ((11, 0), ALL, FA4),
    (H100, (without("HDIM64", "SM8x"),), without("HDIM64", "SM8x")), (H100, (without("FP16"), FA2), without("FP16")),
    (H100, (without("HDIM64", "HDIM96", "HDIM128", "HDIM192", "HDIM256"), FA2), FA2),
    (H100, (FlashAttn(2, "2.0.9", "flash_attn"), BETA), BETA),
    (H100, (FlashAttn(3, "0.0.0", fault="it is a placeholder"), FA2), FA2)])
def test_the_generation_taken(capability, installed, taken):
    assert choose_generation(BF16, 64, Machine(capability, flash_attn=installed), False) == (taken, "")


@pytest.mark.parametrize(("capability", "found", "options", "why"), [
    (H100, None, {}, "flash-attn is not installed (docs/gpu.md says how)"),
    (A100, FA3, {}, "flash-attn-3 3.0.0: it is not for compute capability 8.0"),
    (A100, FA4, {}, "flash-attn-4 4.0.0b36: it is not for compute capability 8.0"),
    (B200, FA3, {}, "flash-attn-3 3.0.0: it is not for compute capability 10.0"),
    (H100, FlashAttn(2, "2.0.9", "flash_attn"), {}, "flash-attn 2.0.9: older than 2.5.5 (docs/gpu.md says how)"),
    (B200, FlashAttn(2, "2.7.2", "flash_attn"), {}, "flash-attn 2.7.2: older than 2.7.3 (docs/gpu.md says how)"),
    (B200, FlashAttn(4, "4.0.0b11", "flash_attn.cute"), {},
     "flash-attn-4 4.0.0b11: older than 4.0.0b20 (docs/gpu.md says how)"),
    (H100, FlashAttn(2, None, "flash_attn"), {}, "flash-attn of no stated version: older than 2.5.5 (docs"),
    (B200, FA4, dict(head_dim=72), "flash-attn-4 4.0.0b36: it takes heads of a multiple of 32 up to 128, not 72"),
    (B200, FA4, dict(head_dim=256), "it takes heads of a multiple of 32 up to 128, not 256"),
    (H100, without("BACKWARD"), {}, "flash-attn-3 3.0.0: built with FLASH_ATTENTION_DISABLE_BACKWARD"),
    (H100, without("VARLEN"), {}, "built with FLASH_ATTENTION_DISABLE_VARLEN"),
    (H100, without("FP16"), dict(dtype=FP16), "built with FLASH_ATTENTION_DISABLE_FP16"),
    (H100, without("HDIM192", "HDIM256"), dict(head_dim=160), "built with FLASH_ATTENTION_DISABLE_HDIM160"),
    (H100, BETA, dict(deterministic=True),
     "flash-attn-3 3.0.0b1: --deterministic-mode: builds before 3.0.0 may add gradients in any order"),
    (H100, FA3, dict(deterministic=True, head_dim=200),
     "flash-attn-3 3.0.0: --deterministic-mode: it has no such backward for heads of 200"),
    (H100, without("HDIM64", "HDIM96", "HDIM128", "HDIM192"), dict(deterministic=True),
     "--deterministic-mode: it has no such backward for heads of 64"),
])
def test_why_none_is_taken(capability, found, options, why):
    machine = Machine(capability, flash_attn=(found,) if found else ())
    dtype, head_dim, deterministic = (dict(dtype=BF16, head_dim=64, deterministic=False) | options).values()
    taken, reason = choose_generation(dtype, head_dim, machine, deterministic)
    assert taken is None and why in reason
    with pytest.raises(ConfigError) as caught:
        choose_kernel("flash", dtype, head_dim, machine, deterministic)
    assert str(caught.value) == f"--attention-kernel flash: {reason}; --attention-kernel varlen works here"


def test_a_deterministic_run_takes_what_can():
    machine = Machine(H100, flash_attn=(FA2, BETA))
    assert [choose_generation(BF16, 64, machine, deterministic)[0] for deterministic in (False, True)] == [BETA, FA2]
    assert choose_generation(BF16, 64, Machine(B200, flash_attn=ALL), True)[0] == FA4


def test_all_reasons_are_told_the_first_choice_first():
    machine = Machine(B200, flash_attn=(FlashAttn(2, "2.7.2", "flash_attn"), FA3, FA4))
    assert choose_generation(BF16, 72, machine, False)[1] == (
        "flash-attn-4 4.0.0b36: it takes heads of a multiple of 32 up to 128, not 72, "
        "flash-attn 2.7.2: older than 2.7.3 (docs/gpu.md says how), "
        "flash-attn-3 3.0.0: it is not for compute capability 10.0")


@pytest.mark.parametrize(("version", "oldest", "true"), [
    ("2.8.3.post2", "2.7.3", True), ("2.7.2.post1", "2.7.3", False), ("3.0.0b1", "3.0.0", False),
    ("3.0.0", "3.0.0", True), ("4.0.0b9", "4.0.0b20", False), ("4.0.0b36", "4.0.0b20", True),
    ("2.8.3+cu13torch2.11", "2.5.5", True), ("main", "2.5.5", False), (None, "2.5.5", False)])
def test_versions_are_compared_as_versions(version, oldest, true):
    assert reaches(version, oldest) == true


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages, the only one that has any flash-attn: `site(distribution, version, files)`."""
    monkeypatch.syspath_prepend(tmp_path)
    names = [name for name in sys.modules if name.startswith("flash_attn")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)

    def install(distribution, version, files):
        for name, source in files.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        if distribution:
            info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    yield install
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        del sys.modules[name]


def source(generation, version):
    first, *rest = stand_ins.FLASH_ATTN[generation, version].split(" cu_seqlens_q ")
    return f"def flash_attn_varlen_func({', '.join([*first.split(), 'cu_seqlens_q', *rest[0].split()])}): ...\n"


def test_nothing_is_found_where_nothing_is(site):
    assert [find(generation) for generation in PACKAGES] == [None, None, None]


def test_what_is_installed_is_found_with_version_and_module(site):
    site("flash-attn", "2.8.3.post2", {"flash_attn/__init__": source(2, "2.8.3.post2")})
    site("flash-attn-3", "3.0.0b1", {"flash_attn_interface": source(3, "3.0.0b1"), "flash_attn_config": """
CONFIG = {"build_flags": {"FLASHATTENTION_DISABLE_BACKWARD": False, "FLASHATTENTION_DISABLE_HDIM96": True,
                          "FLASHATTENTION_ENABLE_VCOLMAJOR": True}}
"""})
    assert find(2) == FlashAttn(2, "2.8.3.post2", "flash_attn")
    assert find(3) == FlashAttn(3, "3.0.0b1", "flash_attn_interface", left_out=frozenset({"HDIM96"}))
    assert find(4) is None
    assert find(2).function().__code__.co_argcount == 16


def test_generation_4_alone_is_no_generation_2(site):
    """It fills a namespace package of the same name."""
    site("flash-attn-4", "4.0.0b36", {"flash_attn/cute": source(4, "4.0.0b36")})
    assert find(2) is None and find(4) == FlashAttn(4, "4.0.0b36", "flash_attn.cute")


def test_generation_3_as_a_copied_file_is_found(site):
    site(None, None, {"flash_attn_3/__init__": "", "flash_attn_3/flash_attn_interface": source(3, "3.0.0")})
    assert find(3) == FlashAttn(3, None, "flash_attn_3.flash_attn_interface")


@pytest.mark.parametrize(("generation", "files", "fault"), [
    (3, {}, "it is a placeholder without flash_attn_varlen_func"),
    (3, {"flash_attn_interface": "pass"}, "it is a placeholder without flash_attn_varlen_func"),
    (3, {"flash_attn_interface": "import flash_attn_3._C"},
     "its import fails (ModuleNotFoundError: No module named 'flash_attn_3')"),
    (2, {"flash_attn/__init__": "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105\\nand more')"},
     "its import fails (ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c105)"),
    (2, {"flash_attn/__init__": "raise RuntimeError"}, "its import fails (RuntimeError: )"),
    (4, {"flash_attn/cute": "import cutlass_of_no_one"},
     "its import fails (ModuleNotFoundError: No module named 'cutlass_of_no_one')"),
    (2, {"flash_attn/__init__": "def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
                                "max_seqlen_k, dropout_p, softmax_scale, causal): ..."},
     "its flash_attn_varlen_func has no parameter deterministic"),
])
def test_what_cannot_be_used_says_why(site, generation, files, fault):
    distribution = PACKAGES[generation][0]
    site(distribution, "9.9", files)
    found = find(generation)
    assert (found.generation, found.version, found.fault) == (generation, "9.9", fault)
    capability = next(major for major, order in GENERATIONS.items() if generation in order), 0
    assert choose_generation(BF16, 64, Machine(capability, flash_attn=(found,)), False) == (
        None, f"{distribution} 9.9: {fault}")


def test_generation_2_that_fails_is_no_generation_4(site):
    site("flash-attn", "2.8.3", {"flash_attn/__init__": "raise ImportError('undefined symbol')",
                                 "flash_attn/cute": source(4, "4.0.0b36")})
    assert find(2).fault == "its import fails (ImportError: undefined symbol)" and find(4) is None


def test_a_process_looks_once_and_only_beside_a_gpu(single_rank, monkeypatch):
    looked = []
    monkeypatch.setattr(parallel_flash_attn, "find", lambda generation: looked.append(generation))
    fresh = functools.cache(installed_flash_attn.__wrapped__)
    assert fresh() == fresh() == () and looked == [2, 3, 4]
    if not torch.cuda.is_available():
        monkeypatch.setattr("hrm_megatron.parallel.machine.installed_flash_attn", pytest.fail)
        assert Machine.here().flash_attn == ()


@pytest.mark.parametrize(("generation", "version"), stand_ins.FLASH_ATTN)
def test_the_function_takes_what_we_give(generation, version):
    names = stand_ins.FLASH_ATTN[generation, version].split()
    assert names[:3] == ["q", "k", "v"] and set(NAMES) <= set(names)


@pytest.mark.parametrize(("generation", "version"), [(2, "2.8.3.post2"), (3, "3.0.0"), (4, "4.0.0b36")])
def test_outputs_and_gradients_are_those_of_the_definition(single_rank, parity, generation, version):
    worst = 0.0
    with stand_ins.flash_attn(generation, version, dtypes=(torch.float64,)) as seen:
        for seed in range(PACKINGS):
            lengths = packing(seed)
            overrides = dict(softmax_scale=0.7) if seed % 2 else {}
            generator = torch.Generator().manual_seed(seed)
            q, k, v = (torch.randn(ROW_TOKENS, len(lengths), HEADS, D, generator=generator, dtype=torch.float64)
                       for _ in range(3))
            probe = torch.randn(ROW_TOKENS, len(lengths), HEADS * D, generator=generator, dtype=torch.float64)
            built = attention("flash", **overrides) if generation != 4 else large_heads(**overrides)
            have, want = (outputs_and_gradients(one, q, k, v, probe, PrefixSequences(lengths, None, ROW_TOKENS))
                          for one in (built, attention("dense", **overrides)))
            worst = max(worst, difference(have, want))
            assert all(call["softmax_scale"] == overrides.get("softmax_scale") for call in seen)
            seen.clear()
    # Sums of at most 36 terms around 1, in another order: some 1e-15 each.
    parity(f"{PACKINGS} packings through flash-attn {version}'s interface", worst, 2e-14)


def large_heads(**overrides):
    """Its rule wants heads of 32; the primitive itself takes the small ones of this test too."""
    from hrm_megatron.attention.core import KERNELS
    from hrm_megatron.transformer_config import hrm_config

    config = hrm_config(Architecture(1, HEADS * 32, HEADS, 16, 250), **overrides)
    return KERNELS["flash"](config, layer_number=1, attn_mask_type=None, attention_type="self",
                            softmax_scale=config.softmax_scale)


@pytest.mark.parametrize(("generation", "version", "deterministic"), [
    (*known, deterministic) for known in stand_ins.FLASH_ATTN for deterministic in (False, True)
    if known != (3, "3.0.0b1") or not deterministic])  # which is refused: test_why_none_is_taken
def test_a_deterministic_run_asks_for_a_deterministic_backward(single_rank, generation, version, deterministic):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with stand_ins.flash_attn(generation, version) as seen:
            layer = large_heads()
            q = torch.randn(ROW_TOKENS, 1, HEADS, 32, dtype=BF16)
            layer.attend(q, q, q, PrefixSequences([[(3, 4), (5, 0)]], None, ROW_TOKENS))
    finally:
        torch.use_deterministic_algorithms(before)
    assert [call["deterministic"] for call in seen] == [deterministic] * 2
    assert [call["causal"] for call in seen] == [False, True]
    assert [(call["max_seqlen_q"], call["max_seqlen_k"]) for call in seen] == [(5, 5), (4, 7)]


@pytest.mark.gpu
@pytest.mark.parametrize("generation", PACKAGES)
def test_an_installed_one_has_the_recorded_signature(generation):
    found = find(generation)
    if found is None:
        pytest.skip(f"{PACKAGES[generation][0]} is not installed")
    assert found.fault is None, found
    names = list(inspect.signature(found.function()).parameters)
    known = [signature.split() for (of, _), signature in stand_ins.FLASH_ATTN.items() if of == generation]
    assert names in known, f"{found}: record its parameters in tests/attention/stand_ins.py"
