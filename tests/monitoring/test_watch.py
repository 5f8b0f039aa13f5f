"""The dashboard says what the files of a run say, and no more."""
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
from rich.console import Console

from hrm_megatron.config import ConfigError
from hrm_megatron.monitoring.dashboard import frame
from hrm_megatron.monitoring.run_folder import NO_MANIFEST, PARTIAL, WHOLE, RunFolder
from hrm_megatron.monitoring.scalars import Log, in_groups
from hrm_megatron.monitoring.status import Progress, sparkline
from tests.monitoring.conftest import STEPS, TICKS, loss_of, write_log

ROOT = Path(__file__).parents[2]
WIDTH = 100


def shown(run, curves, now):
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(frame(run, curves, now, WIDTH))
    lines = console.file.getvalue().splitlines()
    assert {len(line) for line in lines} == {WIDTH}
    return [re.sub(r"\s+", " ", line.strip("│ ")) for line in lines]


def test_a_frame_says_where_the_run_stands(written):
    run = RunFolder.find(written.folder)
    lines = shown(run, Log(run.log).curves(), written.now + 14)
    assert lines[1] == "step 30 of 40, 20s left, last line 14s ago"  # ten steps of two seconds
    assert lines[3].startswith(f"loss {loss_of(30, 1):.4f} ") and "█" in lines[3]
    assert "tokens/s 1.23k " + "▁" * 30 in lines
    assert "validation 20 4.5000 nan% 25.0%" in lines
    assert "residual RMS L 4 H 4 L 4" in lines
    saves = lines[lines.index("saves") + 2:]
    assert [line.split()[0] for line in saves[:4]] == ["10", "20", "30", "35"]
    assert [line.split("B ", 1)[1][:len(state)] == state for line, state in zip(
        saves, (WHOLE, "damaged: __0_0.distcp.note: 999 bytes long, ", WHOLE, PARTIAL), strict=False)] == [True] * 4
    assert "starts: 2; bad steps: 7, 8" in lines


def test_a_step_that_was_run_twice_counts_once(written):
    loss = Log(RunFolder.find(written.folder).log).curves()["lm loss"]
    assert loss.steps == [*range(1, 31)]
    assert loss.values == pytest.approx([loss_of(step, step > 20) for step in loss.steps], rel=1e-6)


def test_a_log_grows_under_the_eyes_of_its_reader(tmp_path):
    write_log(tmp_path, range(1, 4), 0)
    log = Log(tmp_path)
    assert log.curves()["lm loss"].steps == [1, 2, 3]
    write_log(tmp_path, range(4, 6), 1)
    assert log.curves()["lm loss"].steps == [1, 2, 3, 4, 5]


def test_ticks_stand_in_their_order(written):
    curves = Log(RunFolder.find(written.folder).log).curves()
    assert in_groups(curves, ["residual RMS"]) == [f"residual RMS/{tick}" for tick in TICKS]


def test_a_run_that_is_over_has_no_time_left(written):
    run = RunFolder.find(written.folder)
    loss = Log(run.log).curves()["lm loss"]
    done = Progress.of(loss, 30)
    assert done.done and done.seconds_left == 0
    assert Progress.of(loss, None).seconds_left is None and not Progress.of(loss, STEPS).done


def test_a_sparkline_keeps_its_width():
    assert sparkline([1, 2, 3], 10) == "▁▅█"
    assert sparkline([0] * 5 + [7] * 5, 2) == "▁█"
    assert sparkline([3, float("nan"), 3], 5) == "▁▁" and sparkline([], 5) == ""


def test_a_save_without_a_manifest_is_said_to_have_none(tmp_path):
    place = tmp_path / "iter_0000007"
    place.mkdir()
    (place / ".metadata").write_bytes(b"x")
    save, = RunFolder.find(tmp_path).saves()
    assert (save.step, save.state, save.size_bytes) == (7, NO_MANIFEST, 1)
    assert shown(RunFolder.find(tmp_path), {}, 0)[1] == "no step is logged yet"


def test_the_tool_prints_one_frame(written, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["watch.py", str(written.folder), "--once"])
    assert runpy.run_path(str(ROOT / "tools" / "watch.py"))["main"]() == 0
    assert "step 30 of 40" in capsys.readouterr().out


@pytest.mark.parametrize("words, reason", [
    (["nowhere", "--once"], "nowhere: no folder"), ([".", "--once", "--every", "0"], "--every 0.0: must be at least")])
def test_the_tool_refuses_in_one_line(tmp_path, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["watch.py", *words])
    assert runpy.run_path(str(ROOT / "tools" / "watch.py"))["main"]() == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"error: {reason}")


def test_two_runs_in_one_folder_are_not_mixed(written, tmp_path):
    with pytest.raises(ConfigError, match="neither a TensorBoard log nor checkpoints"):
        RunFolder.find(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.out.tfevents.1").touch()
    with pytest.raises(ConfigError, match="several TensorBoard logs are in it"):
        RunFolder.find(tmp_path)
