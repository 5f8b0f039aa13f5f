"""Pictures of runs: every curve that a log has is in them, by its own values."""
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hrm_megatron.config import ConfigError
from hrm_megatron.monitoring import picture, report
from hrm_megatron.monitoring.run_folder import RunFolder
from hrm_megatron.monitoring.scalars import Curve, read_log
from tests.monitoring.conftest import TICKS

ROOT = Path(__file__).parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def curves(written):
    return read_log(RunFolder.find(written.folder)).curves()


def test_there_is_a_panel_for_each_kind_of_curve(curves):
    titles = {panel.curve or panel.group[0] for panel in picture.panels({"XL": curves})}
    assert titles == {"lm loss", "exact accuracy", "bp steps", "learning-rate", "tokens per second",
                      f"residual RMS/{TICKS[0]}"}
    two = [panel for panel in picture.panels({"a": curves, "b": curves}) if panel.group]
    assert [panel.title.rpartition(", ")[2] for panel in two] == ["a", "b"]


def test_a_run_that_was_only_tested_has_its_panels_and_one_without_curves_is_refused(curves):
    tested = {"lm loss test": curves["lm loss"], "exact accuracy test EMA": curves["lm loss"]}
    assert [panel.curve for panel in picture.panels({"XL": tested})] == ["lm loss", "exact accuracy"]
    assert picture.draw({"XL": tested}, "XL").startswith(PNG_SIGNATURE)
    with pytest.raises(ConfigError, match="XL: no curve in the log that is drawn"):
        picture.draw({"XL": {"grad-norm vs samples": curves["lm loss"]}}, "XL")


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


def test_a_running_mean_looks_back_and_forgets_what_is_no_number():
    assert picture.running_mean([2, 4, 9], 2) == [2, 3, 6.5]
    assert picture.running_mean([2, math.nan, 4, 6], 2)[3] == 5


def test_tasks_that_a_run_answered_are_shown(curves):
    tasks = {f"{name} tasks EMA{behind}": Curve([20, 30], [0.5, value], [0.0, 1.0]) for name, value in (
        ("gsm8k acc", 0.25), ("gsm8k acc stderr", 0.01)) for behind in ("", " vs samples")}
    panel = picture.panels({"XL": curves | tasks})[-1]
    axes = Figure().subplots()
    picture.draw_panel(axes, panel, {"XL": curves | tasks})
    assert [(line.get_label(), [*line.get_ydata()]) for line in axes.get_lines()] == [("gsm8k acc", [0.5, 0.25])]
    assert report._live_tasks(tasks) == [("gsm8k acc", "30", "25.0%", "50.0%", "20")]


def test_what_no_line_can_show_is_marked(curves):
    lost = curves | {"lm loss": Curve([1, 2, 3], [math.nan, 2.0, math.inf], [0.0, 1.0, 2.0])}
    loss, exact = picture.panels({"a": lost})[:2]
    assert [picture.missing_steps(panel, {"a": lost, "b": curves}) for panel in (loss, exact)] == [[1, 3], []]
    axes = Figure().subplots()
    picture.draw_panel(axes, loss, {"a": lost})
    assert [*axes.get_lines()[-1].get_xdata()] == [1, 3]
    assert "not a finite number" in axes.get_legend_handles_labels()[1]
    group = next(panel for panel in picture.panels({"a": curves, "b": curves}) if panel.group and panel.run == "b")
    name = group.group[1]
    assert picture.missing_steps(group, {"a": curves, "b": curves | {name: Curve([5], [math.nan], [0.0])}}) == [5]


@pytest.fixture
def tool(call):
    return call("plot_run.py")


def test_the_tool_draws_runs_over_one_another(written, call, tool, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(written.folder / "log")
    assert tool(written.folder, other, "--output", tmp_path / "both.png") == (0, [])
    assert call.out == f"{tmp_path / 'both.png'}\n"
    assert (tmp_path / "both.png").read_bytes().startswith(PNG_SIGNATURE)
    assert {path.name for path in tmp_path.iterdir()} == {"both.png", "other"}


def test_the_tool_refuses_in_one_line(written, tool, tmp_path):
    for words, reason in ((["nowhere", "--output", "a.png"], "nowhere: no folder"),
                          ([written.folder, "--output", "a.pdf"], "--output a.pdf: the name of this file must end"),
                          ([written.folder, written.folder, "--output", "a.png"], f"{written.folder}: a run is given"),
                          ([written.checkpoints, "--output", "a.png"], f"{written.checkpoints}: has no TensorBoard")):
        code, said = tool(*words)
        assert code == 1 and len(said) == 1 and said[0].startswith(f"error: {reason}"), said
