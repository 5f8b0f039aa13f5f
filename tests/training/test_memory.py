"""Flags that save memory, on machines that are not here."""
from types import SimpleNamespace

import pytest

from hrm_megatron.parallel.cpu import activate

activate()

from hrm_megatron.config import ConfigError  # noqa: E402
from hrm_megatron.parallel.machine import Machine  # noqa: E402
from hrm_megatron.training.memory import check_memory, choose_recompute_modules  # noqa: E402

HOPPER = Machine((9, 0), "2.16.1")
USUAL = dict(
    recompute_ticks=0, bp_max_steps=5, recompute_granularity=None, recompute_modules=None,
    recompute_activations=False, recompute_gated_act=False, fp8=None, fp8_recipe="delayed", num_layers=8,
    cpu_offloading_num_layers=0, transformer_impl="transformer_engine", pipeline_model_parallel_size=1,
    use_torch_fsdp2=False, use_megatron_fsdp=False)
OFFLOADED = dict(cpu_offloading_num_layers=4)


@pytest.mark.parametrize("changes", [
    {}, OFFLOADED, dict(cpu_offloading_num_layers=7), dict(OFFLOADED, recompute_ticks=2),
    dict(OFFLOADED, fp8="hybrid"), dict(recompute_gated_act=True, recompute_ticks=2),
    dict(recompute_ticks=2, fp8="hybrid", fp8_recipe="tensorwise")])
def test_what_works(changes):
    check_memory(SimpleNamespace(**USUAL | changes), HOPPER)


@pytest.mark.parametrize("machine, changes, parts", [
    (HOPPER, dict(recompute_ticks=2, fp8="hybrid"),
     ["--recompute-ticks 2 with --fp8-recipe delayed", "choose another recipe"]),
    (Machine((9, 0), "2.9"), OFFLOADED, ["--cpu-offloading-num-layers 4: Transformer Engine 2.9 is older than 2.10",
                                         "--recompute-ticks saves activations anywhere"]),
    (Machine((9, 0)), OFFLOADED, ["--cpu-offloading-num-layers 4: Transformer Engine is not installed (pip install"]),
    (HOPPER, dict(cpu_offloading_num_layers=8), ["--cpu-offloading-num-layers 8: ", "choose 1 to 7"]),
    (HOPPER, dict(cpu_offloading_num_layers=-1), ["--cpu-offloading-num-layers -1: ", "choose 1 to 7"]),
    (HOPPER, dict(OFFLOADED, transformer_impl="local"), ["is incompatible with --transformer-impl local"]),
    (HOPPER, dict(OFFLOADED, pipeline_model_parallel_size=2), ["is incompatible with --pipeline-model-parallel-size"]),
    (HOPPER, dict(OFFLOADED, recompute_granularity="selective"), ["is incompatible with --recompute-granularity"]),
    (HOPPER, dict(OFFLOADED, recompute_activations=True), ["is incompatible with --recompute-granularity"]),
    (HOPPER, dict(OFFLOADED, recompute_gated_act=True), ["is incompatible with --recompute-modules gated_act"]),
    (HOPPER, dict(recompute_gated_act=True, fp8="hybrid"), ["gated_act: saves nothing in FP8", "leave it"]),
    (HOPPER, dict(OFFLOADED, use_torch_fsdp2=True), ["is incompatible with --use-torch-fsdp2"]),
    (HOPPER, dict(OFFLOADED, use_megatron_fsdp=True), ["is incompatible with --use-megatron-fsdp"]),
])
def test_what_is_refused(machine, changes, parts):
    with pytest.raises(ConfigError) as refused:
        check_memory(SimpleNamespace(**USUAL | changes), machine)
    for part in parts:
        assert part in str(refused.value)


def recomputation(modules, granularity="selective", activations=False):
    args = SimpleNamespace(recompute_modules=modules, recompute_granularity=granularity,
                           recompute_activations=activations)
    choose_recompute_modules(args)
    return args.recompute_gated_act, args.recompute_granularity, args.recompute_modules


def test_our_module_is_taken_out_of_megatrons_list():
    assert recomputation(["gated_act"]) == (True, None, None)
    assert recomputation(["mlp", "gated_act"]) == (True, "selective", ["mlp"])
    assert recomputation(["core_attn"]) == (False, "selective", ["core_attn"])
    assert recomputation(None) == (False, "selective", None)
    assert recomputation(["gated_act"], None, activations=True) == (True, None, None)
    assert recomputation(None, "full") == (False, "full", None)


@pytest.mark.parametrize("modules, granularity, parts", [
    (["layernorm"], "selective", ["--recompute-modules layernorm: saves nothing", "core_attn, mlp, gated_act"]),
    (["gated_act"], None, ["--recompute-modules gated_act: has no effect without --recompute-granularity selective"]),
    (["core_attn", "mlp"], "full", ["--recompute-modules core_attn mlp: has no effect without"]),
])
def test_modules_without_effect_are_refused(modules, granularity, parts):
    with pytest.raises(ConfigError) as refused:
        recomputation(modules, granularity)
    for part in parts:
        assert part in str(refused.value)
