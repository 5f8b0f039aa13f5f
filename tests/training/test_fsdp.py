"""Sharded weights: Megatron-FSDP trains as one process does, and both kinds of FSDP resume bitwise.

tests/training/test_layouts.py and test_gradients.py hold FSDP2 against the reference and against other layouts.
"""
import re

import pytest

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.convert.table import table
from tests.training.conftest import scalars
from tests.training.test_gradients import MEGATRON_FSDP, ROWS, TOLERANCE
from tests.training.test_layouts import AVERAGE_TOLERANCE, FSDP2, LOSS_TOLERANCE, RESUME_TOLERANCE, TP
from tests.training.test_resume import tensors_that_differ

pytestmark = pytest.mark.ranks
RUNS = {"1 process": (1, []), "1 process in bf16": (1, ["--bf16"]), "FSDP2": (2, [FSDP2]),
        "FSDP2 in bf16": (2, [FSDP2, "--bf16"]), "Megatron-FSDP": (2, [MEGATRON_FSDP]),
        "Megatron-FSDP in bf16": (2, [MEGATRON_FSDP, "--bf16"]),
        "Megatron-FSDP, overlap": (2, [MEGATRON_FSDP, "--overlap-grad-reduce", "--overlap-param-gather"])}


@pytest.fixture(scope="session")
def from_seed(launch, fullbatch_arguments, tmp_path_factory):
    """Train 24 steps from the seed, saving at 12 and 24; once for all tests."""
    done = {}

    def train(name):
        if name not in done:
            ranks, flags = RUNS[name]
            folder = tmp_path_factory.mktemp("seed")
            run = launch(*fullbatch_arguments, "--save", folder / "checkpoints", "--save-interval", 12,
                         "--tensorboard-dir", folder / "log", "--log-params-norm", "--log-num-zeros-in-grad", *flags,
                         ranks=ranks)
            assert run.code == 0, run.output[-5000:]
            done[name] = folder
        return done[name]
    return train


@pytest.mark.slow
def test_megatron_fsdp_trains_as_one_process(from_seed, parity):
    ours, one = from_seed("Megatron-FSDP"), from_seed("1 process")
    losses = [scalars(folder / "log") for folder in (ours, one)]
    assert losses[0].keys() == losses[1].keys() == set(range(1, 25))
    parity("Megatron-FSDP: 24 losses", max(abs(losses[0][step] - losses[1][step]) for step in losses[0]),
           LOSS_TOLERANCE)
    ends = [read_megatron(find_iteration(folder / "checkpoints")) for folder in (ours, one)]
    assert ends[0].embedding_updates == ends[1].embedding_updates < 24
    for part in ("raw", "ema"):
        parity(f"Megatron-FSDP: {part} at the end", max((ends[0].read(part, entry) - ends[1].read(
            part, entry)).abs().max().item() for entry in table(ends[0].architecture) if entry.trained),
            AVERAGE_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if "FSDP" in name])
def test_norms_are_those_of_one_process(from_seed, parity, name):
    one = from_seed("1 process in bf16" if "bf16" in name else "1 process")
    for norm in "grad-norm", "params-norm":
        found, expected = (scalars(folder / "log", norm) for folder in (from_seed(name), one))
        assert found.keys() == expected.keys() == set(range(1, 25))
        # In bf16 each gradient is rounded, by up to 2^-8, after which the runs go their own ways. Of the weights'
        # masters, which each step moves by its rate, all of that is far below the tolerance of fp32.
        rounded = "bf16" in name and norm == "grad-norm"
        parity(f"{name}: {norm}", max(abs(found[step] / expected[step] - 1) for step in ([1] if rounded else expected)),
               2 ** -8 if rounded else AVERAGE_TOLERANCE)
    if "bf16" not in name:  # where more of them are rounded to zero
        assert scalars(from_seed(name) / "log", "num-zeros") == scalars(one / "log", "num-zeros")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if "FSDP" in name])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(from_seed, launch, fullbatch_arguments, parity, tmp_path, name):
    ranks, flags = RUNS[name]
    whole = from_seed(name)
    run = launch(*fullbatch_arguments, "--load", whole / "checkpoints", "--ckpt-step", 12, "--save", tmp_path / "new",
                 "--save-interval", 12, "--tensorboard-dir", tmp_path / "log", *flags, ranks=ranks)
    assert run.code == 0, run.output[-5000:]
    assert re.search(r"checkpoint: \S+/iter_0000012 verified: 0\.00 GB in \S+ s$", run.output, re.MULTILINE)
    assert scalars(tmp_path / "log") == {step: loss for step, loss in scalars(whole / "log").items() if step > 12}
    ends = [find_iteration(folder) for folder in (tmp_path / "new", whole / "checkpoints")]
    assert not tensors_that_differ(*ends)
    assert tensors_that_differ(ends[0], find_iteration(whole / "checkpoints", 12))  # it has trained
    assert read_megatron(ends[0]).embedding_updates == read_megatron(ends[1]).embedding_updates


@pytest.mark.slow
def test_a_converted_checkpoint_of_megatron_fsdp_goes_on_anywhere(from_seed, launch, fullbatch_arguments, parity,
                                                                  tmp_path):
    whole = from_seed("Megatron-FSDP")
    convert(Conversion(whole / "checkpoints", "megatron", tmp_path / "plain", "megatron", ckpt_step=12))
    run = launch(*fullbatch_arguments, "--load", tmp_path / "plain", "--exit-interval", 17, "--tensorboard-dir",
                 tmp_path / "log")
    assert run.code == 0, run.output[-5000:]
    ours, one = scalars(tmp_path / "log"), scalars(whole / "log")
    assert ours.keys() == set(range(13, 18))
    parity("Megatron-FSDP to 1 process: 5 losses", max(abs(ours[step] - one[step]) for step in ours), RESUME_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FSDP2 in bf16", "Megatron-FSDP in bf16"])
def test_bf16_follows_one_process(from_seed, parity, name):
    ours, one = (scalars(from_seed(run) / "log") for run in (name, "1 process in bf16"))
    # Each adds gradients in an order and a precision of its own: FSDP2 those of ticks and micro-batches in bf16.
    parity(f"{name}: 24 losses", max(abs(ours[step] - one[step]) for step in one), 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, flags", [(2, [FSDP2]), (4, [FSDP2, TP, 2, "--sequence-parallel"]),
                                          (2, [MEGATRON_FSDP])], ids=["FSDP2", "FSDP2 x TP 2 + SP", "Megatron-FSDP"])
def test_gradients_are_clipped_by_the_norm_of_all(launch, parity, tmp_path, ranks, flags):
    """The norm is above 1, so that the step's gradients are scaled by less than 0.01."""
    moments, norms = [], []
    for number, more in ((1, []), (ranks, flags)):
        run = launch(*ROWS, "--global-batch-size", 8, "--micro-batch-size", 2, "--bp-min-steps", 5, "--clip-grad", 0.01,
                     "--save", tmp_path / str(number), "--verbose", *more, ranks=number)
        assert run.code == 0, run.output[-5000:]
        norms += map(float, re.findall(r"grad norm: (\S+)", run.last_output))
        moments.append(read_megatron(find_iteration(tmp_path / str(number))))
    assert len(norms) == 2 and min(norms) > 1 and abs(norms[1] - norms[0]) < 2e-3  # printed with three digits
    worst = max((ours - one).abs().max().item() / one.abs().max().item() for ours, one in (
        (end.read("exp_avg", entry) for end in reversed(moments)) for entry in table(moments[0].architecture)
        if entry.trained))
    parity(f"{' '.join(map(str, flags))}: clipped gradients", worst, TOLERANCE)


@pytest.mark.slow
def test_megatron_fsdp_trains_on_and_on(launch, fullbatch_arguments):
    """Gathers that gloo does by itself once ended such a run after 0 to 190 steps, ten times out of ten."""
    run = launch(*fullbatch_arguments, MEGATRON_FSDP, "--train-iters", 400, ranks=2, timeout_seconds=300)
    assert run.code == 0, run.output[-5000:]


@pytest.mark.slow
def test_formats_do_not_mix(from_seed, launch, fullbatch_arguments, native_start):
    for folder, ranks, flags, words in (
            (native_start, 2, [MEGATRON_FSDP], "saved without --use-megatron-fsdp, "),
            (from_seed("Megatron-FSDP") / "checkpoints", 1, [], "saved with --use-megatron-fsdp, ")):
        run = launch(*fullbatch_arguments, "--load", folder, *flags, ranks=ranks)
        assert run.code == 2 and len(run.errors) == 1 and words in run.errors[0], run.output[-5000:]
