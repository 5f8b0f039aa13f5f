"""What is shown of a dataset is what is in it."""
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data import write_report as written
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.preprocess import preprocess
from hrm_megatron.data.report import Lengths, SourceLine, markdown, report_on
from hrm_megatron.data.sampling_rules import Rule, Rules, read_rules
from tests.data.listed_store import ListedStore
from tests.stores import write_single, write_store

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, tokenizer):
    """Two sources, of which one has bad rows, a long one, and dollars where matplotlib would see a formula."""
    import json
    folder = tmp_path_factory.mktemp("report")
    for name, count in (("$a_$", 40), ("b", 10)):
        rows = [json.dumps(dict(condition="", instruction=f"$x_{i} and $" + "z" * (i % 7), response="y" * (1 + i)))
                for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join([*rows, *(["{", "["] if name == "b" else [])]) + "\n")
    preprocess([folder / "$a_$.jsonl", folder / "b.jsonl"], folder / "x", tokenizer, context_size=40,
               skip_bad_rows=True)
    return folder / "x"


def test_lengths_are_those_of_the_examples(prefix):
    store = IndexedExamples(prefix)
    report = report_on(store)
    for lengths, shown in zip(store.lengths(), (report.prefixes, report.responses), strict=True):
        assert shown.longest == lengths.max() and shown.mean == pytest.approx(lengths.mean())
        assert [shown.counts[n] for n in range(shown.longest + 1)] == [(lengths == n).sum()
                                                                      for n in range(shown.longest + 1)]
        for share in (0.01, 0.5, 0.99):
            assert (lengths <= shown.quantile(share)).mean() >= share > (lengths < shown.quantile(share)).mean()


def test_lengths_are_counted_in_blocks(monkeypatch):
    monkeypatch.setattr("hrm_megatron.data.report.BLOCK_EXAMPLES", 3)
    assert Lengths.of(np.array([1, 5, 2, 9, 2, 2, 1])).counts.tolist() == [0, 2, 3, 0, 0, 1, 0, 0, 0, 1]


def test_the_report_names_sources_and_what_was_left_out(prefix):
    store = IndexedExamples(prefix)
    text = markdown(report_on(store, row_tokens=40))
    tokens = [source.shard.tokens for source in store.manifest.sources]
    truncated = [source.truncated for source in store.manifest.sources]
    assert truncated[0] > truncated[1] == 0
    assert f"50 examples, {sum(tokens):,} tokens, {truncated[0]} responses truncated, 2 rows skipped" in text
    assert f"| $a_$.jsonl | 40 | {tokens[0] / sum(tokens):.1%} | {truncated[0]} | 0 |" in text
    assert f"| b.jsonl | 10 | {tokens[1] / sum(tokens):.1%} | 0 | 2 |" in text
    assert "- skipped 2: broken JSON, first " in text
    positions = int((np.array(store.lengths()).sum(0) - 1).sum())
    share, rows = re.search(r"Rows of 40 positions are ([\d.]+)% full: an epoch's .* in ([\d,]+) rows", text).groups()
    assert float(share) == pytest.approx(100 * positions / (int(rows) * 40), abs=0.005)  # two decimals


def test_coverage_follows_the_rules(prefix, tmp_path, monkeypatch):
    rules = "- {prefix: b, max_per_file: 8, repeat: 2}\n- {prefix: $a, max_per_file: 30}\n"
    (tmp_path / "rules.yaml").write_text(rules)
    lines = report_on(IndexedExamples(prefix), 40, rules=read_rules(tmp_path / "rules.yaml"), epochs=1).sources
    assert [(line.seen, line.repeats) for line in lines] == [(30 / 40, 1.0), (1.0, 1.6)]  # 16 of 10: a walk and a part
    lines = report_on(IndexedExamples(prefix), 40, epochs=3).sources
    assert [(line.seen, line.repeats) for line in lines] == [(1.0, 3.0), (1.0, 3.0)]
    fill = report_on(IndexedExamples(prefix), 20, rules=read_rules(tmp_path / "rules.yaml"), epochs=1).fill
    assert (fill.examples, fill.of) == (30 + 16, 50)
    with monkeypatch.context() as patch:
        patch.setattr("hrm_megatron.data.report.FILL_EXAMPLES", 35)  # none of b, which has a rule
        fill = report_on(IndexedExamples(prefix), 20, rules=read_rules(tmp_path / "rules.yaml"), epochs=1).fill
    assert (fill.examples, fill.of) == (30, 35)
    with pytest.raises(ConfigError, match="more than a row of 20"):  # where no rules cut what is longer
        report_on(IndexedExamples(prefix), 20)
    with pytest.raises(ConfigError, match="--epochs: .*give --seq-length"):
        report_on(IndexedExamples(prefix), epochs=2)
    with pytest.raises(ConfigError, match="--sampling-rules: .*--epochs"):
        report_on(IndexedExamples(prefix), 40, rules=read_rules(tmp_path / "rules.yaml"))


def test_where_no_row_can_be_made_of_the_first_examples_nothing_is_said_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("hrm_megatron.data.report.FILL_EXAMPLES", 3)
    store = ListedStore(tmp_path, ["p"] * 7, [30] * 4 + [5] * 3, [2] * 7, [("a", 4), ("b", 3)])
    store.metadata = dict(tokens=149)
    report = report_on(store, 20, rules=Rules(tmp_path / "r", (Rule("b", repeat=2),)), epochs=1)
    assert report.fill is None and "positions are" not in markdown(report)


def test_a_table_holds_names_and_sources_of_any_kind(tmp_path, tokenizer, write_jsonl):
    empty, odd = write_jsonl("in/empty.jsonl", []), write_jsonl("in/a|b.jsonl", [
        dict(condition="", instruction="a", response="b")])
    preprocess([empty, odd], tmp_path / "x", tokenizer)
    lines = markdown(report_on(IndexedExamples(tmp_path / "x"), 40, epochs=2)).splitlines()
    assert "| a\\|b.jsonl | 1 | 100.0% | 0 | 0 | 100.0% | 2.00 |" in lines
    assert "| empty.jsonl | 0 | 0.0% | 0 | 0 | - | - |" in lines


@needs_matplotlib
def test_sources_whose_names_look_alike_have_bars_of_their_own(prefix, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from hrm_megatron.data.report_picture import draw_report
    begin = "a/name/that/many/sources/begin/with/"
    sources = tuple(SourceLine(f"{begin}{end}.jsonl", 1, tokens, 0, 0) for end, tokens in (("one", 5), ("another", 3)))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[2]))
    draw_report(replace(report_on(IndexedExamples(prefix)), sources=sources), tmp_path / "x.png")
    axes, = drawn
    assert [(bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in axes.patches] == [(5, 0), (3, 1)]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0].endswith("one.jsonl") and names[1].endswith("another.jsonl") and max(map(len, names)) <= 36


@needs_matplotlib
def test_a_picture_of_a_row_grows_with_its_examples_alone(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    from hrm_megatron.data import report_picture
    pairs = [(3, 2), (4, 0)]
    assert [report_picture.shown_positions(n, pairs) for n in (9, 10, 1 << 14)] == [9, 10, 10]
    assert report_picture.shown_positions(1 << 14, [(1, 1)]) == 8
    monkeypatch.setattr(report_picture, "MASK_PIXELS", 4)
    shown, imshow = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axes, colours, **options: shown.append(colours) or imshow(
        axes, colours, **options))
    mask = np.tri(10, dtype=bool)
    report_picture.draw_row(["t"] * 99, [""] * 99, pairs, mask, "a row", tmp_path / "x.png")
    assert shown[0].tolist() == [[1, 0, 0, 0], [1, 2, 0, 0], [1, 2, 1, 0], [1, 2, 1, 2]]


@needs_matplotlib
def test_matplotlib_has_no_lines_among_those_of_a_program(tmp_path):
    """Here about a home that cannot be written."""
    (tmp_path / "home").touch()
    done = subprocess.run([sys.executable, "-c", "import hrm_megatron.data.report_picture"], capture_output=True,
                          text=True, env={**os.environ, "HOME": str(tmp_path / "home"), "MPLCONFIGDIR": ""})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_matplotlib
def test_the_tool_writes_text_and_picture(prefix, tool, capsys):
    assert tool("inspect_data")([str(prefix), "--seq-length", "40", "--epochs", "2", "--verify"]) == 0
    out = capsys.readouterr().out
    assert " bytes are what was written\n# x\n" in out and "| seen in 2 epochs | times each |" in out
    assert out.endswith(f"report: {prefix}.report.md, {prefix}.report.png\n")
    text = (prefix.parent / "x.report.md").read_text()
    assert "](x.report.png)" in text and "Rows of 40 positions" in text
    assert (prefix.parent / "x.report.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_the_text_alone(prefix, monkeypatch, tool, capsys):
    (prefix.parent / "x.report.png").write_bytes(b"of an earlier run")
    monkeypatch.setattr(written, "can_draw", lambda: False)
    lines = written.write_report(report_on(IndexedExamples(prefix)))
    assert lines == [f"report: {prefix}.report.md", "matplotlib is not installed: no picture (pip install matplotlib)"]
    assert "png" not in (prefix.parent / "x.report.md").read_text() and not (prefix.parent / "x.report.png").exists()


@needs_matplotlib
@pytest.mark.parametrize("row_tokens", [40, 300])  # named positions, and too many for that
def test_a_row_is_shown_with_its_borders_and_labels(prefix, tokenizer, tool, capsys, tmp_path, row_tokens):
    arguments = [str(prefix), "--row", "1", "--seq-length", str(row_tokens), "--tokenizer-model", str(tokenizer.path),
                 "--picture", str(tmp_path / "row.png")]
    assert tool("inspect_data")(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    store, names = IndexedExamples(prefix), [line for line in out if line.startswith("--- ") and "example" in line]
    positions = [line for line in out if re.match(r" *\d+ (prefix  |response) ", line)]
    at = 0
    for name in names:
        i, p, r, labels = map(int, re.fullmatch(
            rf"--- {re.escape(str(prefix))}, example (\d+): (\d+) positions of prefix, (\d+) of response, (\d+) labels",
            name).groups())
        prefix_ids, target_ids = store[i]
        assert (p, r, labels) == (len(prefix_ids), len(target_ids) - 1, len(target_ids))
        own = positions[at:at + p + r]
        assert [" → " in line for line in own] == [False] * (p - 1) + [True] * (r + 1)
        assert own[0].endswith(" prefix   <|im_start|>")
        if target_ids[-1] == tokenizer.eoa:
            assert own[-1].endswith(" → <|box_end|>")
        at += p + r
    assert at == len(positions) and out[-1] == f"picture: {tmp_path / 'row.png'}"
    assert (tmp_path / "row.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, message", [
    (["--row", "0"], "--row: give --seq-length and --tokenizer-model too"),
    (["--seq-length", "0"], "--seq-length 0: must be at least 1"),
    (["--epochs", "-1"], "--epochs -1: must be at least 0"),
    (["--seed", "-1"], "--seed -1: must be at least 0"),
    (["--picture", "x.png"], "--picture: only --row K reads it"),
    (["--row", "0", "--picture", "x.foo"], "--picture x.foo: the name of this file must end with .png"),
    (["--row", "0", "--picture", "x"], "--picture x: the name of this file must end with .png"),
    (["--row", "0", "--seq-length", "40", "--epochs", "5"], "--row 0 is incompatible with --epochs"),
    (["--row", "0", "--sampling-rules", "nowhere.yaml"], "--row 0 is incompatible with --sampling-rules"),
    (["--row", "999", "--seq-length", "40", "--tokenizer-model", "{tokenizer}"], "--row 999: there are "),
])
def test_bad_flags_are_one_line(prefix, tokenizer, tool, capsys, flags, message):
    assert tool("inspect_data")([str(prefix), *(flag.format(tokenizer=tokenizer.path) for flag in flags)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@needs_matplotlib
def test_datasets_of_ids_and_of_the_older_form_have_a_report(tmp_path):
    for write in (write_single, write_store):
        write(tmp_path / "x", [([6, 7], [11]), ([6, 40, 7], [41, 11])])
        store = IndexedExamples(tmp_path / "x")
        assert "2 examples, 8 tokens" in markdown(report_on(store, 4))
        written.write_report(report_on(store, 4))
        for path in tmp_path.glob("x.json"):
            path.unlink()
