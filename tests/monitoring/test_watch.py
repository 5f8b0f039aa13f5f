"""The dashboard says what the files of a run say, and no more."""
import io
import os
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hrm_megatron.config import ConfigError
from hrm_megatron.monitoring.dashboard import frame
from hrm_megatron.monitoring.report import standing
from hrm_megatron.monitoring.run_folder import NO_MANIFEST, PARTIAL, WHOLE, RunFolder
from hrm_megatron.monitoring.scalars import Log, in_groups
from hrm_megatron.monitoring.status import Progress, sparkline
from tests.monitoring.conftest import STEPS, TICKS, loss_of, write_log, write_save

ROOT = Path(__file__).parents[2]
WIDTH = 100


def shown(run, log, now):
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(frame(run, log, now, WIDTH))
    lines = console.file.getvalue().splitlines()
    assert {len(line) for line in lines} == {WIDTH}
    return [re.sub(r"\s+", " ", line.strip("│ ")) for line in lines]


def test_a_frame_says_where_the_run_stands(written):
    run = RunFolder.find(written.folder)
    lines = shown(run, Log(run.log), written.now + 14)
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


@pytest.mark.parametrize("interval, quiet_steps", [(1, 10), (50, 150)])
def test_a_run_is_late_by_its_own_intervals(written, interval, quiet_steps):
    """Steps take two seconds, and a log is written once in so many of them."""
    found = RunFolder.find(written.folder)
    run = replace(found, arguments={**found.arguments, "log_interval": str(interval)})
    for silence, late in ((2 * quiet_steps - 1, False), (2 * quiet_steps + 1, True)):
        console = Console(file=io.StringIO(), width=WIDTH, color_system="standard", force_terminal=True)
        console.print(frame(run, Log(run.log), written.now + silence, WIDTH))
        assert ("\x1b[1;31m, last line" in console.file.getvalue()) == late


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


def test_what_a_run_went_back_from_is_void(tmp_path):
    """The second start goes on from step 10, before the validation at 20, and has come to 12."""
    write_log(tmp_path, range(1, 31), 0)
    write_log(tmp_path, range(11, 13), 1)
    curves = Log(tmp_path).curves()
    assert curves["lm loss"].steps == [*range(1, 13)] and "lm loss validation" not in curves
    assert curves["lm loss"].values[-1] == pytest.approx(loss_of(12, 1))


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage, said", [(cut, "part of a record: it was cut, or is being written"),
                                          (flip, "bytes from there on are not read"),
                                          (lambda path: path.write_bytes(b"no log" * 9), "damaged at byte 0; ")])
def test_a_log_that_is_not_read_to_its_end_is_named(tmp_path, damage, said, call):
    write_log(tmp_path / "run", range(1, 6), 0)
    write_log(tmp_path / "run", range(6, 9), 1)
    first, _ = sorted((tmp_path / "run").iterdir(), key=lambda path: path.name.endswith(".1"))
    damage(first)
    log = Log(tmp_path / "run")
    assert log.curves() and [damage.startswith(f"{first}: ") and said in damage for damage in log.damages()] == [True]
    assert any(said.split()[-1] in line for line in shown(RunFolder.find(tmp_path / "run"), Log(tmp_path / "run"), 0))
    for path in (tmp_path / "run").iterdir():
        path.write_bytes(first.read_bytes()[:30])
    status, (line,) = call("report_run.py")(tmp_path / "run", "--output", tmp_path / "a.html")
    assert status == 1 and "has no TensorBoard log with curves (" in line


def test_a_save_is_seen_that_came_after_the_log(tmp_path, monkeypatch):
    """A pipe gets a frame each time; the run's first save comes between two of them."""
    tool = runpy.run_path(str(ROOT / "tools" / "watch.py"))
    write_log(tmp_path / "log", range(1, 4), 0)
    out = io.StringIO()

    def sleep(_):
        if "saves" in out.getvalue():
            raise KeyboardInterrupt
        write_save(tmp_path / "checkpoints", 3)
    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(KeyboardInterrupt):
        tool["watch"](tool["parser"]().parse_args([str(tmp_path)]))
    first, _, later = out.getvalue().partition("saves")
    assert first.count("step 3") == 2 and "complete" in later


def test_nan_is_no_lowest_loss(tmp_path):
    write_log(tmp_path / "run", range(1, 4), 0, lost=dict.fromkeys(range(1, 4), float("nan")))
    (tmp_path / "run" / "arguments.txt").write_bytes(b"train_iters .... 3\nname ... \xff\n")
    run, log = RunFolder.find(tmp_path / "run"), Log(tmp_path / "run")
    stands = dict(standing(run, log.curves()))
    assert (stands["lowest loss"], stands["last step"]) == ("none is a finite number", "3 of 3")
    write_log(tmp_path / "run", range(4, 6), 1)
    assert dict(standing(run, log.curves()))["lowest loss"] == f"{loss_of(5, 1):.4f} at step 5"


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
    assert sparkline([3, float("nan"), 4], 5) == "▁×█" and sparkline([], 5) == ""
    assert sparkline([float("nan")] * 3 + [1], 2) == "××"


def test_a_save_without_a_manifest_is_said_to_have_none(tmp_path):
    place = tmp_path / "iter_0000007"
    place.mkdir()
    (place / ".metadata").write_bytes(b"x")
    save, = RunFolder.find(tmp_path).saves()
    assert (save.step, save.state, save.size_bytes) == (7, NO_MANIFEST, 1)
    assert shown(RunFolder.find(tmp_path), None, 0)[1] == "no step is logged yet"


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


@pytest.fixture
def apart():
    """Make a run that was started in a folder, where its command named log and checkpoints; return the latter."""
    def make(start, steps, save="runs/XL", log="logs/XL", **more):
        write_log(start / log, range(1, steps + 1), 0)
        write_save(start / save, steps)
        (start / save / "arguments.txt").write_text("".join(f"{name} {'.' * 9} {value}\n" for name, value in dict(
            save=save, tensorboard_dir=log, **more).items()))
        return start / save
    return make


@pytest.mark.parametrize("save", ["runs/XL", "./runs/../XL", "."])
def test_a_relative_log_is_that_of_the_run_and_of_no_other_of_its_name(apart, tmp_path, monkeypatch, call, save):
    """Both were started by the same command, in two folders; the first then loses its log."""
    for name in ("own", "other"):
        (tmp_path / name / "runs").mkdir(parents=True)
    run, other = apart(tmp_path / "own", 3, save), apart(tmp_path / "other", 5, save)
    (tmp_path / "link").symlink_to(run)
    for start in ("own", "other"):
        monkeypatch.chdir(tmp_path / start)
        for folder in (run, Path(os.path.relpath(run)), tmp_path / "link"):
            assert Log(RunFolder.find(folder).log).curves()["lm loss"].steps == [1, 2, 3]
    assert RunFolder.find(other).log.samefile("logs/XL")
    (tmp_path / "own" / "logs").rename(tmp_path / "logs of own")
    assert RunFolder.find(run).log is None and RunFolder.find(tmp_path / "link").log is None
    named = "arguments.txt names --tensorboard-dir logs/XL, which is not found from here and for this run; give that"
    status, (line,) = call("report_run.py")(run, "--output", tmp_path / "a.html")
    assert status == 1 and line.startswith(f"error: {run}: has no TensorBoard log with curves; {named}")
    assert named[:60] in shown(RunFolder.find(run), None, 0)[1]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("save", ["../saved", "{}/saved"])
def test_the_log_of_a_run_that_saves_elsewhere_is_found(apart, tmp_path, monkeypatch, save, told):
    """The arguments say where it was started; of an older run, which does not, it is found from there."""
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    run = apart(tmp_path / "own", 3, save.format(tmp_path), **dict(started_in=tmp_path / "own") if told else {})
    monkeypatch.chdir(tmp_path / "own")
    assert RunFolder.find(run).log.samefile("logs/XL")
    monkeypatch.chdir(tmp_path)
    assert (RunFolder.find(run).log is not None) == told
    write_log(tmp_path / "other" / "logs" / "XL", [1], 0)
    monkeypatch.chdir(tmp_path / "other")
    assert not told or RunFolder.find(run).log.samefile(tmp_path / "own" / "logs" / "XL")


def test_the_log_of_a_run_that_saves_through_a_link_is_found(apart, tmp_path):
    """The folder of --save has other parents than its name."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "runs").symlink_to(tmp_path / "scratch")
    apart(tmp_path / "own", 3, started_in=tmp_path / "own")
    assert RunFolder.find(tmp_path / "scratch" / "XL").log.samefile(tmp_path / "own" / "logs" / "XL")


def test_the_log_of_a_moved_run_with_an_absolute_save_is_found(apart, tmp_path, monkeypatch):
    """Another run has taken its place."""
    (tmp_path / "own").mkdir()
    run = apart(tmp_path / "own", 3, str(tmp_path / "own" / "runs" / "XL"), started_in=tmp_path / "own")
    moved = (tmp_path / "own").rename(tmp_path / "moved")
    apart(tmp_path / "own", 5, str(run), started_in=tmp_path / "own")
    for start, folder in ((moved, Path("runs/XL")), (tmp_path, moved / "runs" / "XL")):
        monkeypatch.chdir(start)
        assert RunFolder.find(folder).log.samefile(moved / "logs" / "XL")
    assert RunFolder.find(run).log.samefile(tmp_path / "own" / "logs" / "XL")


def test_an_absolute_log_is_the_one_that_is_named(apart, tmp_path):
    (tmp_path / "own").mkdir()
    assert RunFolder.find(apart(tmp_path / "own", 4, log=str(tmp_path / "log"))).log == tmp_path / "log"
