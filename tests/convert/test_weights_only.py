"""A folder of weights alone is trained from, and not taken for a run to go on with."""
from __future__ import annotations

import pytest
import torch

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.native import read_native
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.convert.table import table
from tests.training.conftest import FULLBATCH, fullbatch_arguments  # noqa: F401  # a fixture

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("weights") / "megatron"
    said = convert(Conversion(FULLBATCH / "native_init", "native", place, "megatron", weights="ema"))
    assert "ema weights" in said and "train from them with --finetune" in said
    return place


@pytest.mark.parametrize("flags", [["--load", "{}", "--finetune"], ["--pretrained-checkpoint", "{}", "--load", "{new}"],
                                   ["--load", "{}", "--no-load-optim"]], ids=lambda flags: flags[-2])
def test_moments_and_ema_begin_at_the_weights(launch, fullbatch_arguments, folder, tmp_path, flags):  # noqa: F811
    new = tmp_path / "checkpoints"
    run = launch(*fullbatch_arguments, *(flag.format(folder, new=new) for flag in flags), "--lr", 0, "--min-lr", 0,
                 "--lr-warmup-iters", 0, "--weight-decay", 0, "--exit-interval", 1, "--save", new)
    assert run.code == 0, run.output[-5000:]
    begun, expected = read_megatron(find_iteration(new)), dict(read_native(FULLBATCH / "native_init").weights("ema"))
    assert begun.iteration == 1
    for entry in table(begun.architecture):
        assert torch.equal(begun.read("raw", entry), expected[entry.megatron])
        if entry.trained:
            assert torch.equal(begun.read("ema", entry), expected[entry.megatron])
    assert begun.read("exp_avg_sq", table(begun.architecture)[-1]).any()  # moments of this step


def test_going_on_is_refused_in_one_line(launch, fullbatch_arguments, folder):  # noqa: F811
    run = launch(*fullbatch_arguments, "--load", folder)
    assert run.code
    [error] = run.errors
    assert "iter_0000000: holds no exp_avg of the optimizer for " in error and "give --finetune to begin" in error
