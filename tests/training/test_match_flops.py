"""--match-flops-of by the command line of a run: what trains decides the FLOPs of its steps."""
import contextlib
import io
import re
import sys

import pytest

from hrm_megatron.parallel.cpu import activate

activate()

from hrm_megatron.training import arguments  # noqa: E402
from hrm_megatron.training.data import open_sources  # noqa: E402
from hrm_megatron.training.match_flops import match_flops  # noqa: E402
from tests.training.conftest import FULLBATCH  # noqa: E402

MATCHED = ["--sampled-data-path", FULLBATCH / "sampled", "--seq-length", 96, "--global-batch-size", 8,
           "--micro-batch-size", 2, "--eval-iters", 0, "--match-flops-of", "B", "--train-iters", 400, "--finetune",
           "--pretrained-checkpoint", "none", "--bp-min-steps", 2, "--dry-run"]


@pytest.mark.parametrize(("flags", "steps"), [([], 400), (["--lora-rank", 8], 500)])
def test_adapters_alone_train_for_more_steps(monkeypatch, flags, steps):
    """An HRM in the preset's sizes costs what it costs; frozen weights have no gradient, a third of the matmuls."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, [*MATCHED, *flags])])
    monkeypatch.setattr(arguments, "take_model", lambda *_: None)  # of a checkpoint, which is not there
    with contextlib.redirect_stdout(io.StringIO()):
        args = arguments.parse_arguments(lambda _: 512)
    (line,) = match_flops(args, open_sources(args))
    assert abs(args.train_iters - steps) <= steps * 0.1 and re.search(rf"for {args.train_iters}$", line), line
