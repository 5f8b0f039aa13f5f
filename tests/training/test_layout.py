"""The layout that is announced is the one that is built."""
import argparse
import re

import pytest
import torch

from hrm_megatron.config import Architecture, ConfigError, LoRA
from hrm_megatron.parallel.main_grad import Apex
from hrm_megatron.planner.layout import check_stages, stage_parameters
from hrm_megatron.training import layout
from hrm_megatron.training.layout import describe, describe_pipeline, explain_weight_gradients

ARGUMENTS = dict(
    world_size=16, tensor_model_parallel_size=2, pipeline_model_parallel_size=4, context_parallel_size=1,
    data_parallel_size=2, sequence_parallel=True, global_batch_size=64, micro_batch_size=1, seq_length=96, num_layers=7,
    hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, vocab_size=250, h_cycles=2, l_cycles=3,
    norm_placement="pre", init_scheme="lecun_normal", init_std=None, layernorm_epsilon=1e-6, rotary_base=10_000,
    bp_min_steps=2, bp_max_steps=5, pipeline_schedule="auto", pipeline_window=None, attention_kernel="sdpa",
    decoder_first_pipeline_num_layers=2, decoder_last_pipeline_num_layers=1, params_dtype=torch.bfloat16,
    gradient_accumulation_fusion=False, compile_layers=False, transformer_impl="local", use_torch_fsdp2=False,
    use_megatron_fsdp=False, data_parallel_sharding_strategy="optim_grads_params", lora_rank=None,
    accumulate_allreduce_grads_in_fp32=True)


def test_stages_hold_together_what_one_model_holds(single_rank):
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    architecture = Architecture(7, 32, 4, 48, 250)
    model = HRMModel(hrm_config(architecture), seed=1)
    counted = {name: parameter.numel() for name, parameter in model.named_parameters()}
    stages = stage_parameters(architecture, [2, 2, 2, 1])
    assert sum(stages) == sum(counted.values()) == architecture.num_parameters
    third = sum(n for name, n in counted.items() if ".layers.4." in name or ".layers.5." in name)
    assert stages[2] == third and stages[0] == third + counted["embedding.word_embeddings.weight"]


def test_the_description_counts_per_rank():
    lines = describe(argparse.Namespace(**ARGUMENTS)).splitlines()
    assert lines[0] == ("layout: 16 ranks = TP 2 x PP 4 x CP 1 x DP 2, sequence parallel; a step is 32 micro-batches "
                        "of 1 x 96 tokens on each replica")
    layer = 32 * (5 * 32 + 3 * 48)
    assert lines[3].startswith(f"  stage 2: 2 layers of each stack, {2 * 2 * layer / 2 / 1e6:.2f} M parameters a rank")
    assert [line.split(":")[1].split(" layers")[0].strip() for line in lines[1:5]] == ["2", "2", "2", "1"]
    state = 32 * 96 * 32 * 2 / 2 / 2**30  # z_L of 32 rows in bf16, halved by SP
    pair = 2 * state  # and z_H
    assert lines[5:7] == [
        f"  pipeline at bp 2: two phases; the first stage keeps {pair:.3f} GiB of states; simulated bubble 4.4%, 11 "
        "ticks alive on a stage",
        f"  pipeline at bp 5: two phases; the first stage keeps {state:.3f} GiB of states; simulated bubble 2.4%, 23 "
        "ticks alive on a stage"]
    assert lines[7:] == ["weight gradients: summed over the ticks of a micro-batch by autograd, in bfloat16",
                         "attention: sdpa (torch's scaled_dot_product_attention, a call for each piece of an "
                         "example), as asked"]
    windows = describe(argparse.Namespace(**ARGUMENTS | dict(pipeline_window=16))).splitlines()
    assert windows[6] == ("  pipeline at bp 5: two phases for each of 2 windows; the first stage keeps "
                          f"{state / 2:.3f} GiB of states; simulated bubble 4.2%, 23 ticks alive on a stage")
    one = describe(argparse.Namespace(**ARGUMENTS | dict(pipeline_schedule="stock"))).splitlines()
    assert one[6] == "  pipeline at bp 5: one phase; simulated bubble 6.9%, 20 ticks alive on a stage"


@pytest.mark.parametrize("bp_steps, states", [(2, 2), (3, 1), (5, 1)])
def test_states_between_the_phases_are_counted(bp_steps, states):
    line = describe_pipeline(argparse.Namespace(**ARGUMENTS | dict(seq_length=2**15, pipeline_window=16)), bp_steps)
    assert f"the first stage keeps {states * 16 * 2**15 * 32 * 2 / 2 / 2**30:.3f} GiB" in line  # 0.016 or 0.031


KERNELS, BROKEN = object(), "its import fails (ImportError: undefined symbol)"


@pytest.mark.parametrize(("cuda", "apex", "options", "line"), [
    (False, Apex(None, "no CUDA device"), {}, "torch's matmul"),
    (True, Apex(KERNELS), {}, "Apex's fused kernel"),
    (True, Apex(None, "not installed"), {}, "torch's matmul (Apex's fused kernel: not installed)"),
    (True, Apex(None, BROKEN), {}, f"torch's matmul (Apex's fused kernel: {BROKEN})"),
    (True, Apex(KERNELS), dict(compile_layers=True), "torch's matmul, compiled, in the head by Apex's fused kernel"),
    (True, Apex(KERNELS), dict(transformer_impl="transformer_engine"),
     "Transformer Engine, in the head by Apex's fused kernel"),
])
def test_who_adds_the_gradients_of_weights_is_told(monkeypatch, cuda, apex, options, line):
    monkeypatch.setattr(layout, "find_apex", lambda: apex)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    args = argparse.Namespace(**ARGUMENTS | dict(gradient_accumulation_fusion=True) | options)
    assert explain_weight_gradients(args) == f"of every tick added to Megatron's buffer by {line}"


def test_the_shares_of_context_ranks_are_told(launch, fullbatch_arguments):
    run = launch(*fullbatch_arguments, "--context-parallel-size", 2, "--exit-interval", 1, ranks=2)
    assert run.code == 0, run.output[-3000:]
    told = re.search(r"\ndata: context parallel: the busiest of 2 ranks has (1\.\d\d) times the mean of .* over 64 "
                     "rows", run.output)
    assert told and 1 <= float(told[1]) < 1.5


def test_fsdp_shares_weights_and_gradients_out():
    large = dict(hidden_size=2048, num_attention_heads=16, ffn_hidden_size=4096, pipeline_model_parallel_size=1,
                 data_parallel_size=8, decoder_first_pipeline_num_layers=None, decoder_last_pipeline_num_layers=None)
    def sizes(**options):
        line = describe(argparse.Namespace(**ARGUMENTS | large | options)).splitlines()[1]
        return [float(part.split()[1]) for part in line.split("; ")[1].split(", ")]
    weights, gradients, optimizer = sizes()
    for options, expected in (
            (dict(use_torch_fsdp2=True), (weights / 8, weights / 8)),
            (dict(use_megatron_fsdp=True), (weights / 8, gradients / 8)),
            (dict(use_megatron_fsdp=True, data_parallel_sharding_strategy="optim_grads"), (weights, gradients / 8)),
            (dict(use_megatron_fsdp=True, data_parallel_sharding_strategy="optim"), (weights, gradients))):
        assert sizes(**options) == pytest.approx([*expected, optimizer], abs=1e-3)
    assert gradients == pytest.approx(2 * weights, abs=2e-3)


@pytest.mark.parametrize("options, weights, trained, itemsize", [
    (dict(), 0, 1, 4), (dict(accumulate_allreduce_grads_in_fp32=False), 0, 1, 2),
    (dict(lora_rank=64, lora_alpha=None, lora_target_modules=None), 1, 0, 4)])
def test_what_trains_has_gradients_and_state(options, weights, trained, itemsize):
    large = dict(hidden_size=2048, num_attention_heads=16, ffn_hidden_size=4096, pipeline_model_parallel_size=1,
                 decoder_first_pipeline_num_layers=None, decoder_last_pipeline_num_layers=None)
    line = describe(argparse.Namespace(**ARGUMENTS | large | options)).splitlines()[1]
    found = [float(part.split()[1]) * 2**30 for part in line.split("; ")[1].split(", ")]
    a = Architecture(7, 2048, 16, 4096, 250)
    adapters = LoRA(64, 64).num_parameters(a) / 2
    counted = a.num_parameters / 2
    trains = counted if trained else adapters
    # As printed, to three digits of GiB. On two replicas: masters, moments and EMA.
    assert found == pytest.approx([2 * (counted + weights * adapters), itemsize * trains, 16 * trains / 2],
                                  abs=0.5e-3 * 2**30)


@pytest.mark.parametrize("num_layers, stages, first, last", [
    (5, 2, 6, None), (5, 2, 5, None), (5, 2, 0, None), (5, 2, 1, 1), (8, 4, 2, 3), (7, 4, 2, 2), (4, 3, 1, 3)])
def test_layers_that_cannot_be_shared_are_refused(num_layers, stages, first, last):
    with pytest.raises(ConfigError, match=f"leaves -?\\d+ of {num_layers} layers of each stack for the other"):
        check_stages(num_layers, stages, first, last)


def test_layers_that_can_be_shared_are_taken():
    for num_layers, stages, first, last in ((5, 2, 3, None), (5, 2, 3, 2), (5, 2, None, 1), (8, 4, 2, 2), (5, 1, None,
                                                                                                         None)):
        check_stages(num_layers, stages, first, last)
