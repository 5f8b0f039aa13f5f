"""`--lora-rank`: adapters train alone, in every layout alike, go on bitwise, and leave merged weights behind."""
from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.checkpoint.fsdp_folder import open_run
from hrm_megatron.config import PRESETS, Architecture, ConfigError, LoRA
from hrm_megatron.convert.checkpoint import PARTS, Checkpoint, Training
from hrm_megatron.convert.ledger import EXPORT_FILE
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.convert.table import table
from hrm_megatron.convert.to_megatron import write_megatron
from hrm_megatron.generate.load import load_model, open_checkpoint
from hrm_megatron.training.finetune import choose_source
from hrm_megatron.training.lora import check_adapters, describe_lora, lora_of, saved_bytes, settle_lora
from tests.tools import load_tool
from tests.training.conftest import FULLBATCH, scalars
from tests.training.test_layouts import CP, LOSS_TOLERANCE, PP, TP
from tests.training.test_resume import tensors_that_differ

RANK, ALPHA = 4, 8.0
DATA = ["--sampled-data-path", FULLBATCH / "sampled", "--global-batch-size", 4, "--micro-batch-size", 1, "--eval-iters",
        0, "--log-interval", 1]
LORA = ["--lora-rank", RANK, "--lora-alpha", ALPHA, "--train-iters", 3, "--lr", 1e-2]
LAYOUTS = {  # ranks and flags
    "TP 2": (2, [TP, 2]),
    "TP 2 x PP 2 + SP": (4, [TP, 2, PP, 2, "--sequence-parallel"]),
    "PP 2": (2, [PP, 2]),
    "CP 2": (2, [CP, 2]),
    "DP 2, overlap": (2, ["--overlap-grad-reduce", "--overlap-param-gather"]),
    "recompute": (1, ["--recompute-ticks", 2, "--recompute-granularity", "selective", "--recompute-modules",
                      "core_attn", "mlp"]),
    "gated_act": (1, ["--recompute-granularity", "selective", "--recompute-modules", "gated_act"]),
}


@pytest.fixture(scope="module")
def start(single_rank, tmp_path_factory):
    """A checkpoint of random weights, whose EMA are others, as wide as those that training begins with."""
    architecture, generator = Architecture(2, 32, 4, 256, 250), torch.Generator().manual_seed(3)

    def read(part, entry):
        tensor = torch.randn(entry.shape, generator=generator) * entry.shape[-1] ** -0.5
        return tensor if entry.trained else tensor.bfloat16()
    folder = tmp_path_factory.mktemp("start") / "checkpoints"
    write_megatron(Checkpoint(folder, architecture, Training(seq_length=96, tokens_per_step=384, total_steps=9), 7, 5,
                              frozenset(PARTS), read), folder)
    return folder


@pytest.fixture(scope="module")
def tune(launch, tmp_path_factory):
    """Fine-tune into a new folder with these flags; `start` is the folder to begin from."""
    def run(start, *flags, ranks=1, folder=None):
        folder = folder or tmp_path_factory.mktemp("lora")
        done = launch("--finetune", "--pretrained-checkpoint", start, *DATA, *LORA, "--save", folder,
                      "--tensorboard-dir", folder / "log", *flags, ranks=ranks)
        assert done.code == 0, done.output[-3000:]
        return folder, done.output
    return run


@pytest.fixture(scope="module")
def tuned(tune, start):
    """Three steps of one process: the folder, and what it printed."""
    return tune(start)


@pytest.mark.slow
@pytest.mark.ranks
def test_adapters_train_alone_and_are_merged_as_they_are_read(tuned, start):
    folder, output = tuned
    before, after = read_megatron(find_iteration(start)), read_megatron(find_iteration(folder))
    stored = open_run(find_iteration(folder))
    keys = {key for key in stored.keys() if key.startswith("optimizer.state.")}  # noqa: SIM118
    assert keys and all(".lora." in key for key in keys)
    changed = 0
    for entry in table(before.architecture):
        start = before.part_of("ema", entry)
        assert torch.equal(stored.tensor(entry.megatron).to(start.dtype), start), "a frozen weight moved"
        if "_stack" not in entry.megatron:
            assert torch.equal(after.read("raw", entry), start)
            continue
        layer = entry.megatron.removesuffix("weight")
        for part, name in (("raw", "param"), ("ema", "ema")):
            a, b = (stored.tensor(f"optimizer.state.{name}.{layer}lora.{factor}").double() for factor in "AB")
            assert torch.linalg.matrix_rank(b @ a) == RANK
            merged = start.double() + ALPHA / RANK * b @ a
            # Rounded once behind sums of RANK products: a unit of the largest for each.
            bound = (RANK + 2) * 2 ** -24 * (start.abs().max() + 2 * (b.abs() @ a.abs()).max())
            assert (after.read(part, entry) - merged).abs().max() <= bound, entry.megatron
            changed += not torch.equal(after.read(part, entry), start)
    assert changed == 2 * 2 * 2 * 4  # parts, stacks, layers, linear layers of each
    assert "adapters of rank 4, scaled by 2" in output and "all others are frozen, which saves" in output


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_same_adapters(tune, tuned, start, layout):
    ranks, flags = LAYOUTS[layout]
    losses, wanted = (scalars(folder / "log") for folder in (tune(start, *flags, ranks=ranks)[0], tuned[0]))
    assert wanted.keys() == losses.keys() and len(wanted) == 3
    assert abs(wanted[3] - wanted[1]) > 10 * LOSS_TOLERANCE
    assert max(abs(losses[step] - wanted[step]) for step in wanted) <= LOSS_TOLERANCE


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("second", [[], [TP, 2]], ids=["one process", "TP 2"])
def test_the_same_command_again_goes_on(tune, tuned, start, tmp_path, second):
    tune(start, "--exit-interval", 2, folder=tmp_path)
    shutil.rmtree(tmp_path / "log")
    tune(start, *second, ranks=2 if second else 1, folder=tmp_path)
    whole, rest = scalars(tuned[0] / "log"), scalars(tmp_path / "log")
    assert set(rest) == {3} and max(abs(rest[step] - whole[step]) for step in rest) <= LOSS_TOLERANCE
    if not second:
        assert rest == {step: whole[step] for step in rest}
        assert not tensors_that_differ(find_iteration(tuned[0]), find_iteration(tmp_path))


@pytest.mark.slow
@pytest.mark.ranks
def test_every_export_is_of_merged_weights(tuned, tmp_path):
    folder = tuned[0]
    source = open_checkpoint(folder)
    weights = dict(load_model(source).named_parameters())
    for form in ("hf", "native", "megatron"):
        said = convert(Conversion(folder, "megatron", tmp_path / form, form))  # which compares logits
        assert "ema weights of iteration" in said and "adapters merged" in said
        if form != "megatron":
            convert(Conversion(tmp_path / form, form, tmp_path / f"from_{form}", "megatron"))
        again = read_megatron(find_iteration(tmp_path / ("megatron" if form == "megatron" else f"from_{form}")))
        for entry in (entry for entry in table(again.architecture) if entry.trained):
            assert torch.equal(again.read("raw", entry), weights[entry.megatron]), (form, entry.megatron)


def arguments(**changes):
    """What settles the adapters of a fine-tuning that is given as it should be."""
    values = dict(finetune=True, skip_train=False, finetune_from=None, lora_rank=4, lora_alpha=None,
                  lora_target_modules=None, hidden_size=24, use_torch_fsdp2=False, use_megatron_fsdp=False,
                  fp8=None, compile_layers=False, transformer_impl=None, params_dtype=torch.bfloat16,
                  no_save_optim=None)
    return argparse.Namespace(**values | changes)


@pytest.mark.parametrize("changes, said", [
    (dict(lora_rank=None, lora_alpha=8.0), "--lora-alpha: has no effect without --lora-rank"),
    (dict(lora_rank=None, lora_target_modules=["linear_fc1"]), "--lora-target-modules: has no effect without"),
    (dict(finetune=False), "adapters change a trained model; give --finetune"),
    (dict(finetune=False, skip_train=True), "--skip-train evaluates merged weights, which have no adapters; leave"),
    (dict(lora_rank=0), "--lora-rank 0: must lie between 1 and the hidden size, 24"),
    (dict(lora_rank=25), "--lora-rank 25: must lie between 1 and"),
    (dict(lora_alpha=0.0), "--lora-alpha 0.0: must be a positive number"),
    (dict(finetune_from="state"), "--lora-rank 4 is incompatible with --finetune-from state"),
    (dict(use_torch_fsdp2=True), "incompatible with --use-torch-fsdp2"),
    (dict(use_megatron_fsdp=True), "incompatible with --use-megatron-fsdp"),
    (dict(fp8="hybrid"), "incompatible with --fp8-format"),
    (dict(compile_layers=True), "incompatible with --compile-layers"),
    (dict(transformer_impl="transformer_engine"), "incompatible with --transformer-impl transformer_engine"),
], ids=str)
def test_what_is_not_built_is_one_line(changes, said):
    with pytest.raises(ConfigError) as refused:
        settle_lora(arguments(**changes))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_settings_are_kept_and_held_against_those_of_a_checkpoint(tmp_path):
    args = arguments()
    settle_lora(args)
    assert args.transformer_impl == "local" and lora_of(args) == LoRA(4, 4.0)
    assert lora_of(arguments(lora_rank=None)) is None is lora_of(argparse.Namespace())
    targets = [arguments(lora_target_modules=names) for names in (["linear_fc1", "linear_qkv"], ["linear_qkv"] * 2 + [
        "linear_fc1"])]
    assert lora_of(targets[0]) == lora_of(targets[1]) == LoRA(4, 4.0, ("linear_qkv", "linear_fc1"))
    ours, folder = lora_of(args), tmp_path / "iter_0000004"
    check_adapters(folder, ours, ours, begins=False)
    check_adapters(folder, None, ours, begins=True)
    for theirs in (None, LoRA(4, 8.0), LoRA(4, 4.0, ("linear_qkv",))):
        with pytest.raises(ConfigError, match="trained with .*the command line has --lora-rank 4"):
            check_adapters(folder, theirs, ours, begins=False)


@pytest.mark.parametrize("refused", ["adapters", "EMA under FSDP"])
def test_the_command_of_a_refusal_converts_the_iteration_that_was_asked_for(uninterrupted, tmp_path, refused):
    folder = shutil.copytree(uninterrupted / "checkpoints", tmp_path / "lo ra") / "iter_0000012"
    with pytest.raises(ConfigError) as error:
        if refused == "adapters":
            check_adapters(folder, LoRA(4, 4.0), None, begins=True)
        else:
            choose_source(argparse.Namespace(finetune_from=None, use_torch_fsdp2=True), folder,
                          ["optimizer.state.ema.embedding"])
    command, made = re.search("by `python tools/convert_checkpoint.py (.*)`, and give (.*) without --ckpt-step",
                              str(error.value)).groups()
    assert load_tool("convert_checkpoint").main(shlex.split(command)) == 0
    assert json.loads((Path(made) / EXPORT_FILE).read_text())["iteration"] == 12


def test_what_it_saves_is_counted():
    xl = PRESETS["XL"].architecture()
    total, factors = xl.num_parameters, LoRA(4, 4.0).num_parameters(xl)
    assert saved_bytes(arguments(), xl) == 2 * (total + factors) + 16 * factors
    assert saved_bytes(arguments(lora_rank=None), xl) == 18 * total
    assert saved_bytes(arguments(lora_rank=None, no_save_optim=True), xl) == 2 * total
    # bf16: of a frozen weight the gradient, master, two moments and the EMA are not there, 4 bytes each; each factor
    # has 2 bytes of its own and those.
    gb = f"{(20 * total - 22 * factors) / 1e9:,.2f} GB"
    assert f"saves {gb}" in describe_lora(arguments(), xl) and describe_lora(arguments(lora_rank=None), xl) == ""
