"""The report of a run stands alone, and says what its files say."""
import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.monitoring.conftest import loss_of
from tests.monitoring.test_plot import PNG_SIGNATURE

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """Rows of all tables under their headings, tags, and what the page would load."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.loads, self.tags, self.heading, self.open = {}, [], set(), "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.setdefault(self.heading, []).append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.heading = data
        elif self.open and self.open[-1] in ("td", "th"):
            self.rows[self.heading][-1].append(data)


@pytest.fixture
def tool(call):
    return call("report_run.py")


def test_a_report_is_one_file_with_all_that_is_known(written, tool, tmp_path):
    run = tmp_path / "<XL & co>"
    shutil.copytree(written.folder, run)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text(json.dumps(dict(settings=dict(
        checkpoint=str(run / "checkpoints" / "iter_0000020"), iteration=20, weights="ema"), tasks=dict(
        gsm8k=dict(metrics=dict(accuracy=dict(value=0.845, stderr=0.0)), questions=1319, samples=8)))))
    (run / "slurm").mkdir()
    (run / "slurm" / "attempts.json").write_text(json.dumps([dict(
        job="91", restart=1, nodes=["n1", "n2"], first_step=0, last_step=20, end="failed", why="rank 3")]))
    assert tool(run, "--output", tmp_path / "report.html") == (0, [])
    assert {path.name for path in tmp_path.iterdir()} == {"<XL & co>", "report.html"}
    page = Page((tmp_path / "report.html").read_text())
    assert not page.open[1:] and not page.tags & {"script", "link", "iframe", "object", "form", "a"}
    assert [load[:22] for load in page.loads] == ["data:image/png;base64,"]
    assert base64.b64decode(page.loads[0].partition(",")[2]).startswith(PNG_SIGNATURE)
    stands = {row[0]: row[1] for row in page.rows["Where it stands"]}
    assert stands["last step"] == "30 of 40" and stands["a step takes"] == "2s"
    assert stands["loss"] == f"{loss_of(30, 1):.4f}" and stands["lowest loss"] == f"{loss_of(20, 0):.4f} at step 20"
    assert stands["steps gone back from"] == "7, 8" and stands["folder"].endswith("<XL & co>")
    assert page.rows["Evaluation"][1:] == [["validation", "20", "4.5000", "nan%", "25.0%"],
                                           ["task", "metric", "value", "questions", "samples", "checkpoint"],
                                           ["gsm8k", "accuracy", "84.5% ± 0.0%", "1319", "8", "iteration 20, ema"]]
    saves = page.rows["Checkpoints"][1:]
    assert [row[0] for row in saves] == ["10", "20", "30", "35"] and {row[4] for row in saves} == {"not read"}
    assert saves[0][3] == "complete" and saves[1][3].startswith("damaged: __0_0.distcp.note: 999 bytes long")
    assert [row[1:] for row in page.rows["Starts"][1:3]] == [["1", "25"], ["21", "30"]]
    assert page.rows["Starts"][4] == ["91.1", "n1 n2", "0", "20", "failed: rank 3"]
    assert ["hidden_size", "32"] in page.rows["Settings"] and ["a_note", "<b>bold</b>"] in page.rows["Settings"]


def test_a_checkpoint_that_is_not_in_the_run_is_named(written, tool, tmp_path):
    """Which may be the run's own, before its folder was moved."""
    run = tmp_path / "run"
    shutil.copytree(written.folder, run)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text(json.dumps(dict(settings=dict(
        checkpoint="/elsewhere/iter_0000020", iteration=20, weights=None), tasks=dict(
        gsm8k=dict(metrics=dict(accuracy=dict(value=0.845, stderr=None)), questions=1319, samples=1)))))
    assert tool(run, "--output", tmp_path / "report.html") == (0, [])
    assert Page((tmp_path / "report.html").read_text()).rows["Evaluation"][-1] == [
        "gsm8k", "accuracy", "84.5%", "1319", "1", "iteration 20, weights of one kind, of /elsewhere/iter_0000020"]


def test_the_tool_refuses_in_one_line(written, tool, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(written.folder, run)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text("[]")
    for words, reason in (([written.folder, "--output", "a.pdf"], "--output a.pdf: the name of this file must"),
                          ([written.checkpoints, "--output", "a.html"], f"{written.checkpoints}: has no TensorBoard"),
                          ([run, "--output", tmp_path / "a.html"], f"{run / 'evaluation' / 'results.json'}: not what")):
        code, said = tool(*words)
        assert code == 1 and len(said) == 1 and said[0].startswith(f"error: {reason}"), said
    assert not (tmp_path / "a.html").exists()
