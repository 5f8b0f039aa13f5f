"""Which layers and number formats a machine gets, for machines that are not here: facts in, one line out."""
from types import SimpleNamespace

import pytest
import torch

from hrm_megatron.parallel.cpu import activate

activate()

from megatron.core.optimizer.clip_grads import count_zeros_fp32  # noqa: E402

from hrm_megatron.config import ConfigError  # noqa: E402
from hrm_megatron.training.fsdp import choose_fsdp, count_all_zeros  # noqa: E402
from hrm_megatron.training.hardware import (  # noqa: E402
    Machine,
    check_compilation,
    check_precision,
    choose_layers,
)

CPU = Machine()
TURING, AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER = (
    Machine(capability, "2.16.1") for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (12, 0)))
TE = "transformer_engine"


@pytest.mark.parametrize("asked, machine, layers, why", [
    (None, CPU, "local", "needs a CUDA device, and there is none"),
    (None, Machine((9, 0)), "local", "is not installed (pip install"),
    (None, Machine((9, 0), "2.1.0"), "local", "2.1.0 is older than 2.2"),
    (None, Machine((9, 0), "2.2.0"), TE, "Transformer Engine 2.2.0"),
    (None, Machine((9, 0), "2.16.1+cu13"), TE, "2.16.1"),
    (None, Machine((9, 0), "3.0"), TE, "3.0"),
    ("local", HOPPER, "local", "as asked"),
    ("local", CPU, "local", "as asked"),
    (TE, HOPPER, TE, "Transformer Engine 2.16.1"),
])
def test_layers(asked, machine, layers, why):
    found, reason = choose_layers(asked, False, machine)
    assert found == layers and why in reason


@pytest.mark.parametrize("machine, missing", [
    (CPU, "needs a CUDA device"), (Machine((9, 0)), 'pip install "transformer-engine[pytorch,core_cu13]"'),
    (Machine((9, 0), "1.14"), "1.14 is older than 2.2"),
])
def test_transformer_engine_cannot_be_asked_for(machine, missing):
    with pytest.raises(ConfigError) as refused:
        choose_layers(TE, False, machine)
    line = str(refused.value)
    assert line.startswith(f"--transformer-impl {TE}: ") and missing in line
    assert "--transformer-impl local works here" in line


def test_compiled_layers_are_local_ones():
    assert choose_layers(None, True, HOPPER) == ("local", "Megatron's local ones, compiled")
    with pytest.raises(ConfigError, match="--compile-layers: compiles .* local layers, not --transformer-impl transfo"):
        choose_layers(TE, True, HOPPER)


@pytest.mark.parametrize("machine, changes, said", [
    (CPU, {}, "--compile-layers: needs a CUDA device"),
    (HOPPER, dict(tensor_model_parallel_size=2), "is incompatible with --tensor-model-parallel-size"),
    (HOPPER, dict(use_torch_fsdp2=True), "is incompatible with --use-torch-fsdp2"),
    (HOPPER, dict(use_megatron_fsdp=True), "is incompatible with --use-megatron-fsdp"),
    (HOPPER, dict(recompute_gated_act=True), "is incompatible with --recompute-modules gated_act"),
    (HOPPER, dict(recompute_granularity="full"), "--recompute-granularity (--recompute-ticks works)"),
    (HOPPER, dict(recompute_activations=True), "--recompute-granularity (--recompute-ticks works)"),
])
def test_what_cannot_be_compiled(machine, changes, said):
    usual = dict(compile_layers=True, tensor_model_parallel_size=1, use_torch_fsdp2=False, use_megatron_fsdp=False,
                 recompute_gated_act=False, recompute_granularity=None, recompute_activations=False)
    check_compilation(SimpleNamespace(**usual), HOPPER)
    with pytest.raises(ConfigError) as refused:
        check_compilation(SimpleNamespace(**usual | changes), machine)
    assert said in str(refused.value)


def flags(**changes):
    """A run of preset B in bf16 with FP8 layers on one GPU."""
    usual = dict(
        transformer_impl=TE, compile_layers=False, bf16=True, fp8="hybrid", fp8_recipe="tensorwise",
        fp8_param_gather=False, first_last_layers_bf16=False, num_layers_at_start_in_bf16=1,
        num_layers_at_end_in_bf16=1, recompute_granularity=None, recompute_modules=None, num_layers=6, seq_length=4096,
        micro_batch_size=1, hidden_size=1024, ffn_hidden_size=2816, tensor_model_parallel_size=1,
        context_parallel_size=1, pipeline_model_parallel_size=1, sequence_parallel=False)
    return SimpleNamespace(**{**usual, **changes})


NO_FP8 = dict(fp8=None, fp8_recipe="delayed")
FIRST_LAST = dict(first_last_layers_bf16=True)


@pytest.mark.parametrize("machine, changes", [
    (HOPPER, {}), (ADA, {}), (BLACKWELL, dict(fp8_recipe="mxfp8")), (HOPPER, dict(fp8_recipe="delayed")),
    (CONSUMER, {}), (AMPERE, NO_FP8), (CPU, dict(NO_FP8, transformer_impl="local")), (TURING, dict(NO_FP8, bf16=False)),
    (HOPPER, dict(FIRST_LAST, num_layers_at_end_in_bf16=6)), (HOPPER, dict(fp8_param_gather=True)),
    (HOPPER, dict(fp8_recipe="delayed", recompute_granularity="selective", recompute_modules=["core_attn"])),
    (HOPPER, dict(recompute_granularity="full")),
])
def test_precision_that_works(machine, changes):
    check_precision(flags(**changes), machine)


@pytest.mark.parametrize("machine, changes, parts", [
    (TURING, NO_FP8, ["--bf16: this GPU (compute capability 7.5) has no bf16", "leave it out"]),
    (AMPERE, {}, ["--fp8-format hybrid: this GPU (compute capability 8.0) has no FP8, which begins with 8.9"]),
    (HOPPER, dict(fp8_recipe="mxfp8"), ["--fp8-recipe mxfp8: this GPU (compute capability 9.0)", "tensorwise works"]),
    (CONSUMER, dict(fp8_recipe="mxfp8"), ["--fp8-recipe mxfp8: this GPU (compute capability 12.0)", "tensorwise"]),
    (HOPPER, dict(fp8_recipe="blockwise"), ["--fp8-recipe blockwise: choose one of delayed, tensorwise, mxfp8"]),
    (HOPPER, dict(transformer_impl="local", compile_layers=True), ["--compile-layers has no FP8; leave one of them"]),
    (HOPPER, dict(transformer_impl="local"), ["--fp8-format hybrid: --transformer-impl local has no FP8",
                                              "give --transformer-impl transformer_engine"]),
    (CPU, dict(transformer_impl="local"), ["--fp8-format hybrid: Transformer Engine needs a CUDA device", "leave it"]),
    (HOPPER, dict(fp8_recipe="delayed", **FIRST_LAST), ["--first-last-layers-bf16: ", "--fp8-recipe tensorwise"]),
    (HOPPER, dict(FIRST_LAST, num_layers_at_start_in_bf16=4, pipeline_model_parallel_size=2),
     ["--num-layers-at-start-in-bf16 4: counts layers of each stack; choose 0 to 3"]),
    (HOPPER, dict(fp8_recipe="delayed", recompute_granularity="full"), ["--recompute-granularity", "tensorwise"]),
    (HOPPER, dict(fp8_recipe="delayed", recompute_granularity="selective", recompute_modules=["mlp"]),
     ["--recompute-granularity", "core_attn only"]),
    (HOPPER, dict(seq_length=4104), ["4104 positions on a rank are no multiple of 16"]),
    (BLACKWELL, dict(fp8_recipe="mxfp8", seq_length=4112), ["4112 positions on a rank are no multiple of 32"]),
    (HOPPER, dict(context_parallel_size=512), ["8 positions on a rank are no"]),
    (HOPPER, dict(tensor_model_parallel_size=128), ["8 hidden channels on"]),
    (HOPPER, dict(tensor_model_parallel_size=32), ["88 FFN channels on a rank"]),
])
def test_precision_that_is_refused_in_one_line(machine, changes, parts):
    with pytest.raises(ConfigError) as refused:
        check_precision(flags(**changes), machine)
    assert "\n" not in str(refused.value) and all(part in str(refused.value) for part in parts), refused.value


@pytest.mark.parametrize("fsdp, changes, flag", [
    ("use_torch_fsdp2", dict(fp8_param_gather=True), "--fp8-param-gather"),
    ("use_megatron_fsdp", dict(reuse_grad_buf_for_mxfp8_param_ag=True), "--reuse-grad-buf-for-mxfp8-param-ag"),
    ("use_torch_fsdp2", dict(save_wgrads_interval=4), r"--save-wgrads-interval \(it would save none\)"),
    ("use_megatron_fsdp", dict(save_wgrads_interval=4), r"--save-wgrads-interval \(it would save none\)"),
    ("use_torch_fsdp2", dict(ckpt_fully_parallel_load_exchange_algo="gather_object"), "--ckpt-fully-parallel-load-exch"
     r"ange-algo, -process-group \(ranks read their own shards\)"),
    ("use_torch_fsdp2", dict(save_params_interval=4), r"--save-params-interval \(it would save one rank's shards\)")])
def test_what_megatron_would_turn_off_or_save_in_part_beside_fsdp_is_refused(fsdp, changes, flag):
    args = SimpleNamespace(**dict(
        use_torch_fsdp2=False, use_megatron_fsdp=False, pipeline_model_parallel_size=1, fp16=False,
        check_weight_hash_across_dp_replicas_interval=None, recompute_granularity=None, recompute_modules=None,
        data_parallel_sharding_strategy="optim_grads_params", recompute_ticks=0, skip_train=False,
        fp8_param_gather=False, reuse_grad_buf_for_mxfp8_param_ag=False, save_wgrads_interval=None,
        save_params_interval=None, ckpt_fully_parallel_load_exchange_algo="broadcast",
        ckpt_fully_parallel_load_process_group="dp") | {fsdp: True} | changes)
    with pytest.raises(ConfigError, match=f"^--{fsdp.replace('_', '-')} is incompatible with {flag}: leave one of"):
        choose_fsdp(args, None)


def test_a_gradient_that_a_step_does_not_make_counts_as_zeros(single_rank):
    """As that of the embedding in steps whose gradient ticks do not reach down to it, which DDP fills with zeros."""
    made, missing = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(7, 3))
    made.grad = torch.tensor([0.0, 1.0, 0.0, 2.0, 3.0])
    found = count_all_zeros(count_zeros_fp32, [made, missing], torch.distributed.group.WORLD)
    assert found == 2 + 7 * 3 and missing.grad is None and made.grad is not None
