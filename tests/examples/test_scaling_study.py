"""The parts of examples/scaling_study: its plan, its rule for rates, and that an interrupted study goes on."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.compare_architectures.run import main as compare
from examples.recorded import recorded
from examples.scaling_study.plan import TOKENS_PER_STEP, Run, Study, best_multiples
from examples.scaling_study.run import FULL, QUICK, all_runs, described, main
from hrm_megatron.config import ConfigError
from hrm_megatron.planner.scaling_law import read_runs
from hrm_megatron.program import one_line

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 405
SMALL = Study((32, 48, 64), (2048, 3072, 4096), 80, (32, 64), multiples=(0.5, 1.0, 2.0))


def made_row(run, best=None):
    """What training would return: a law of its own for each model, and rates that are worse away from `best`."""
    parameters = 50.0 * run.width ** 2
    off = 0.0 if best is None else abs(run.lr / best(run) - 1)
    loss = 1.5 + 300 / parameters ** 0.5 + (20 if run.model == "hrm" else 30) / run.tokens ** 0.4 + off
    return dict(model=run.model, width=run.width, parameters=parameters, tokens=run.tokens, lr=run.lr, loss=loss,
                flops=6 * parameters * run.tokens, held_out=run.held_out)


def test_the_full_study_is_what_it_says():
    """Five sizes up to 5 M parameters, both models of a width equally large, and a larger one that no law has seen."""
    sizes = {width: {Run(model, width, 1024, 1.0).architecture(VOCAB_SIZE).num_parameters for model in FULL.models}
             for width in (*FULL.widths, FULL.held_out_width)}
    assert all(len(of_models) == 1 for of_models in sizes.values())
    [smallest, *_, largest, held_out] = [size for [size] in sizes.values()]
    assert len(FULL.widths) == 5 and 0.2e6 < smallest < 0.3e6 and 4.5e6 < largest < 5.5e6 < held_out
    runs = list(FULL.runs({"hrm": 1.0, "transformer": 2.0}))
    assert len(runs) == len({*runs}) == 2 * (len(FULL.widths) * len(FULL.tokens) + 1)
    assert [(run.model, run.width, run.tokens) for run in runs if run.held_out] == [
        (model, FULL.held_out_width, max(FULL.tokens)) for model in FULL.models]
    assert all(run.steps * TOKENS_PER_STEP == run.tokens for run in runs)


def test_the_rate_times_the_width_is_the_same_everywhere():
    for multiples in ({"hrm": 1.0, "transformer": 0.5},):
        products = {(run.model, run.lr * run.width) for run in FULL.runs(multiples)}
        assert len({model for model, _ in products}) == len(products) == 2
        [of_hrm], [of_transformer] = ([product for model, product in products if model == name]
                                      for name in ("hrm", "transformer"))
        assert of_hrm == pytest.approx(2 * of_transformer)


def test_the_best_rate_is_found_by_model_and_width():
    losses = [2.0, 1.0, 3.0, 2.0, 1.5, 1.0, 1.0, 2.0, 3.0, 3.0, 2.0, 2.5]
    assert best_multiples(SMALL, losses) == {("hrm", 32): 1.0, ("hrm", 64): 2.0, ("transformer", 32): 0.5,
                                             ("transformer", 64): 1.0}


def test_an_interrupted_study_goes_on_and_ends_as_a_whole_one(tmp_path, capsys):
    trained = []

    def best(run):  # twice the rule's, but of a Transformer of width 64, whose best does not stay put
        return SMALL.rate(run.width, 1.0 if (run.model, run.width) == ("transformer", 64) else 2.0)

    def train(run):
        if len(trained) in (5, 17):  # once among the rates, once among the runs
            trained.append(None)
            raise KeyboardInterrupt
        trained.append(run)
        return made_row(run, best)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            all_runs(SMALL, tmp_path / "a", {"data": "x"}, train)
    rows = all_runs(SMALL, tmp_path / "a", {"data": "x"}, train)
    said = capsys.readouterr().out
    wanted = [*SMALL.trials(), *SMALL.runs({"hrm": 2.0, "transformer": 2.0})]
    assert [run for run in trained if run] == wanted  # none twice, none left out
    assert rows == all_runs(SMALL, tmp_path / "b", {"data": "x"}, lambda run: made_row(run, best))
    assert all_runs(SMALL, tmp_path / "a", {"data": "x"}, lambda run: pytest.fail("trained again")) == rows
    assert "hrm: 2 x the rule's rate is the best at every width that was tried" in said
    assert "transformer: 2 x the rule's rate is the best at the narrowest; at width 64 it is 1" in said
    assert said.count("**") == 2 * (2 * 4)  # the best of each line of the table, which two starts printed
    assert [run.held_out for run in read_runs(tmp_path / "a" / "runs.jsonl")] == [False] * 18 + [True] * 2


def test_runs_of_other_settings_and_of_others_are_refused(tmp_path):
    recorded(tmp_path / "runs.jsonl", {"data": "x"}, SMALL.trials()[:2], made_row, described)
    with pytest.raises(ConfigError, match="runs.jsonl: was begun with data='x', not 'y'.*choose another --output"):
        recorded(tmp_path / "runs.jsonl", {"data": "y"}, SMALL.trials()[:2], made_row, described)
    (tmp_path / "rates.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"rates.jsonl: is not of this example"):
        recorded(tmp_path / "rates.jsonl", {}, SMALL.trials(), made_row, described)
    assert (tmp_path / "rates.jsonl").read_text() == "mine\n"


def without_last(lines):
    return lines[:-1]


def cut(lines):
    return [*lines[:-1], lines[-1][:-40]]


def of_another_run(lines):
    return [*lines[:-1], lines[0]]


@pytest.mark.parametrize("name", ["rates", "runs"])
@pytest.mark.parametrize("damage", [without_last, cut, of_another_run, lambda lines: [*lines, "{}"],
                                    lambda lines: ["[]", *lines[1:]], lambda lines: ["{}", *lines[1:]]])
def test_a_finished_file_that_is_damaged_is_refused_in_one_line(tmp_path, capsys, name, damage):
    all_runs(SMALL, tmp_path, {"data": "x"}, made_row)
    capsys.readouterr()
    path = tmp_path / f"{name}.jsonl"
    damaged = "\n".join(damage(path.read_text().splitlines())) + "\n"
    path.write_text(damaged)
    assert one_line(lambda: all_runs(SMALL, tmp_path, {"data": "x"}, lambda run: pytest.fail("trained"))) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}:") and line.endswith(
        f"remove it and {name}.settings.json to begin again") and path.read_text() == damaged


def test_a_run_that_diverges_is_named_and_left_out_of_the_fit(tmp_path, monkeypatch, capsys):
    """The tool that fits gets all others, of a study that is done as of one that is begun again."""
    study = Study((32, 48, 64), (2048, 3072, 4096), 80, (32,), multiples=(1.0,))
    fitted = []

    def train(run, questions):
        return made_row(run) | (dict(loss=float("nan")) if (run.model, run.width, run.tokens) == ("hrm", 64, 3072)
                                else {})
    monkeypatch.setattr("examples.scaling_study.train.train", train)
    monkeypatch.setattr("examples.scaling_study.run.QUICK", study)
    monkeypatch.setattr("examples.scaling_study.run.Questions.of", lambda demo: SimpleNamespace(digest="x"))
    monkeypatch.setattr("examples.scaling_study.run.run", lambda command, *_: fitted.append(
        read_runs(Path(command[command.index("--input") + 1]))))
    for _ in range(2):
        assert main(["--quick", "--output", str(tmp_path)]) == 0
        assert capsys.readouterr().out.count("left out of the fit: hrm of width 64, 0.20 M parameters, 3,072 tok") == 1
    assert [len(runs) for runs in fitted] == [19, 19]


@pytest.mark.parametrize(("flags", "message"), [
    (["--widths", "64", "70", "80"], "width 70: not a multiple of 16"),
    (["--widths", "64", "80"], "give at least 3 different ones of each"),
    (["--tokens", "1000", "2048", "4096"], "1000 tokens: not a multiple of 1024"),
    (["--held-out-width", "320"], "held-out width 320: the prediction is of a larger model"),
    (["--lr-widths", "96"], "rates are tried at widths [96]: choose from"),
    (["--quick", "--tokens", "2048"], "--quick has sizes of its own; leave it or --tokens out"),
    ([], "no stores/train.json in it; run `make demo`"),
])
def test_a_study_that_cannot_be_is_refused_in_one_line(tmp_path, capsys, flags, message):
    assert main(["--demo", str(tmp_path), "--output", str(tmp_path / "out"), *flags]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_quick_from_questions_to_the_prediction(tmp_path, capsys):
    """On a few questions of the demo's kind: every run is there, and the held-out ones are predicted."""
    from examples.demo.questions import write_questions
    from examples.demo.run import make_stores

    write_questions(tmp_path / "demo" / "questions", 300, 110, 40)
    make_stores(tmp_path / "demo", tmp_path / "commands.log")
    assert main(["--demo", str(tmp_path / "demo"), "--output", str(tmp_path / "out"), "--quick"]) == 0
    out = capsys.readouterr().out
    assert out.count(", measured ") == 2 and "transformer: L(N, D) = " in out
    runs = read_runs(tmp_path / "out" / "runs.jsonl")
    assert len(runs) == 2 * 10 and {run.parameters for run in runs} == {
        Run("hrm", width, 1024, 1.0).architecture(_vocab_size(tmp_path)).num_parameters
        for width in (*QUICK.widths, QUICK.held_out_width)}
    assert json.loads((tmp_path / "out" / "law.json").read_text()).keys() == {"hrm", "transformer"}
    assert (tmp_path / "out" / "law.png").stat().st_size > 1000


def _vocab_size(folder):
    from hrm_megatron.data.tokenizer import TextTokenizer

    return TextTokenizer(folder / "demo" / "tokenizer").vocab_size


def test_a_width_at_which_all_rates_diverge_is_named():
    losses = [float("nan") if trial.width == 64 else 1.0 for trial in SMALL.trials()]
    with pytest.raises(ConfigError, match="hrm of width 64: ends without a finite loss at all of the rates"):
        best_multiples(SMALL, losses)


@pytest.mark.parametrize("begin", [main, compare])
def test_pictures_are_asked_for_before_the_work(begin, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("examples.study.can_draw", lambda: False)
    assert begin(["--quick", "--demo", str(tmp_path / "none")]) == 1
    assert "drawn by matplotlib, which is not installed; pip install" in capsys.readouterr().err
