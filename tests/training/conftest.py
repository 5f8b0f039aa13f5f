"""The reference's own 24-step run as arguments, and the native checkpoint that it began with as a Megatron one."""
from __future__ import annotations

from pathlib import Path

import pytest

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.training.save_lock import LOCK_FILE

activate()

GOLDEN = Path(__file__).parents[1] / "golden"
FULLBATCH = GOLDEN / "fullbatch"


def written(folder):
    """When each file was written; not the note of who holds the folder, which a start writes that then ends."""
    return {path: path.is_file() and path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != LOCK_FILE}


def open_log(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder))
    log.Reload()
    return log


def scalars(folder, name="lm loss"):
    """Values of a TensorBoard log by step."""
    return {event.step: event.value for event in open_log(folder).Scalars(name)}


def curves(folder):
    """What --log-hrm-norms writes: values by step and name."""
    log = open_log(folder)
    return {name: {event.step: event.value for event in log.Scalars(name)} for name in log.Tags()["scalars"]
            if name.startswith(("state RMS/", "residual RMS/", "update/", "EMA/"))}


@pytest.fixture(scope="session")
def fullbatch_arguments():
    """Arguments of golden/fullbatch; (rows per step, micro-batch) may change, the function computed does not."""
    return ["--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", 96,
            "--global-batch-size", 8, "--micro-batch-size", 4, "--sampled-data-path", FULLBATCH / "sampled",
            "--train-iters", 24, "--lr", 4e-3, "--min-lr", 4e-4, "--lr-warmup-iters", 4, "--bp-warmup-fraction", 0.6,
            "--ema-decay", 0.9, "--eval-iters", 0, "--log-interval", 1]


@pytest.fixture(scope="session")
def native_start(tmp_path_factory):
    """golden/fullbatch/native_init, converted by the command line tool's own function."""
    from hrm_megatron.convert.run import Conversion, convert

    folder = tmp_path_factory.mktemp("native") / "start"
    convert(Conversion(FULLBATCH / "native_init", "native", folder, "megatron"))
    return folder


@pytest.fixture(scope="session")
def uninterrupted(launch, fullbatch_arguments, native_start, tmp_path_factory):
    """24 steps of one process that saved at 12 and at 24: the folder with `checkpoints` and `log`."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = launch(*fullbatch_arguments, "--load", native_start, "--save", folder / "checkpoints", "--save-interval", 12,
                 "--tensorboard-dir", folder / "log", "--log-hrm-norms", "--log-params-norm",
                 prelude="import os; os.umask(0o022)")
    assert run.code == 0, run.output
    return folder
