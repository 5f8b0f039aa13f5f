"""The folder of a run as training leaves it, without training: a log of two starts, arguments, saves."""
from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest

from hrm_megatron.checkpoint.manifest import describe_folder, write_manifest

ROOT = Path(__file__).parents[2]
BEGUN, SECONDS_PER_STEP, STEPS = 1_700_000_000.0, 2.0, 40
TICKS = ("tick 1 z_L", "tick 2 z_H", "tick 10 z_L")


def loss_of(step, start):
    return 5.0 - 0.05 * step + start


def write_log(folder, steps, start, lost=MappingProxyType({})):
    """Write the curves of one start, a step every two seconds; `lost` has losses of some of them."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), filename_suffix=f".{start}") as writer:
        for step in steps:
            loss = lost.get(step, loss_of(step, start))
            values = {"lm loss": loss, "exact accuracy": step / 100, "bp steps": 2 + step // 20,
                      "learning-rate": 1e-3, "tokens per second": 1234.0}
            values |= {f"residual RMS/{tick}": 1 + step / 10 for tick in TICKS}
            values |= {"lm loss validation": 4.5, "exact accuracy validation": 0.25} if step == 20 else {}
            for name, value in values.items():
                writer.add_scalar(name, value, step, walltime=BEGUN + SECONDS_PER_STEP * step + 1000 * start)


def write_save(folder, step, size=1000):
    place = folder / f"iter_{step:07d}"
    place.mkdir(parents=True)
    (place / "__0_0.distcp.note").write_bytes(bytes(size))
    write_manifest(place, step, {}, describe_folder(place))
    return place


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """`folder` with 30 of 40 steps in two starts, of which the second ran 21 to 25 again."""
    folder = tmp_path_factory.mktemp("runs") / "XL"
    checkpoints = folder / "checkpoints"
    write_log(folder / "log", range(1, 26), 0)
    write_log(folder / "log", range(21, 31), 1)
    saves = [write_save(checkpoints, step) for step in (10, 20, 30)]
    (checkpoints / "iter_0000035").mkdir()
    (saves[1] / "__0_0.distcp.note").write_bytes(bytes(999))
    (checkpoints / "arguments.txt").write_text(
        f"train_iters {'.' * 37} {STEPS}\nhidden_size {'.' * 37} 32\na_note {'.' * 42} <b>bold</b>\n")
    (checkpoints / "bad_steps.json").write_text(json.dumps(dict(steps=[7, 8], returns={"0": 1})))
    return SimpleNamespace(folder=folder, checkpoints=checkpoints, now=BEGUN + SECONDS_PER_STEP * 30 + 1000)


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the main of a program in tools/ by its name: `call(name)(*words)` is (status, lines of stderr).

    What it printed on stdout is `call.out`.
    """
    def of(name):
        def run(*words):
            monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
            status = runpy.run_path(str(ROOT / "tools" / name))["main"]()
            captured = capsys.readouterr()
            of.out = captured.out
            return status, captured.err.splitlines()
        return run
    return of
