"""Pictures of runs: every curve that a log has is in them, by its own values."""
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hrm_megatron.monitoring import picture
from hrm_megatron.monitoring.run_folder import RunFolder
from hrm_megatron.monitoring.scalars import Curve, read_curves
from tests.monitoring.conftest import TICKS

ROOT = Path(__file__).parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def curves(written):
    return read_curves(RunFolder.find(written.folder))


def test_there_is_a_panel_for_each_kind_of_curve(curves):
    titles = {panel.curve or panel.group[0] for panel in picture.panels({"XL": curves})}
    assert titles == {"lm loss", "exact accuracy", "bp steps", "learning-rate", "tokens per second",
                      f"residual RMS/{TICKS[0]}"}
    two = [panel for panel in picture.panels({"a": curves, "b": curves}) if panel.group]
    assert [panel.title.rpartition(", ")[2] for panel in two] == ["a", "b"]


def test_lines_are_the_curves(curves):
    def lines(name, runs):
        axes = Figure().subplots()
        picture.draw_panel(axes, next(panel for panel in picture.panels(runs) if name in (
            panel.curve, *(each.partition("/")[0] for each in panel.group))), runs)
        return axes.get_lines()
    one = {"XL": curves}
    raw, validation = lines("lm loss", one)  # 2 % of 30 steps is one: no running mean
    assert [*raw.get_xdata()] == curves["lm loss"].steps and [*raw.get_ydata()] == curves["lm loss"].values
    assert [*validation.get_ydata()] == [4.5] and validation.get_label() == "validation"
    assert [*lines("exact accuracy", one)[1].get_ydata()] == [25.0]
    ticks = lines("residual RMS", one)
    assert [line.get_label() for line in ticks] == [*TICKS]
    assert all([*line.get_ydata()] == curves[f"residual RMS/{tick}"].values
               for line, tick in zip(ticks, TICKS, strict=True))
    other = curves | {"lm loss": Curve([1, 2], [9.0, 8.0], [0.0, 1.0])}
    assert [[*line.get_ydata()][:2] for line in lines("lm loss", {"a": curves, "b": other})] == [
        curves["lm loss"].values[:2], [4.5], [9.0, 8.0], [4.5]]


def test_a_running_mean_looks_back():
    assert picture.running_mean([2, 4, 9], 2) == [2, 3, 6.5]


@pytest.fixture
def tool(call):
    return call("plot_run.py")


def test_the_tool_draws_runs_over_one_another(written, tool, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(written.folder / "log")
    assert tool(written.folder, other, "--output", tmp_path / "both.png") == (0, [])
    assert (tmp_path / "both.png").read_bytes().startswith(PNG_SIGNATURE)
    assert {path.name for path in tmp_path.iterdir()} == {"both.png", "other"}


def test_the_tool_refuses_in_one_line(written, tool, tmp_path):
    for words, reason in ((["nowhere", "--output", "a.png"], "nowhere: no folder"),
                          ([written.folder, "--output", "a.pdf"], "--output a.pdf: the picture is a PNG"),
                          ([written.folder, written.folder, "--output", "a.png"], f"{written.folder}: a run is given"),
                          ([written.checkpoints, "--output", "a.png"], f"{written.checkpoints}: has no TensorBoard")):
        code, said = tool(*words)
        assert code == 1 and len(said) == 1 and said[0].startswith(f"error: {reason}"), said
