"""The parts of examples/compare_architectures: equal FLOPs, the best rate, and that an interrupted one goes on."""
from __future__ import annotations

import json
import math

import pytest

from examples.compare_architectures.picture import draw
from examples.compare_architectures.plan import Plan, architecture_of, best_rates, steps_of
from examples.compare_architectures.run import FULL, QUICK, all_runs, chosen, figures, main, parse_arguments, table
from examples.study import chosen_plan
from hrm_megatron.config import ConfigError
from hrm_megatron.model_types import MODEL_TYPES
from hrm_megatron.program import Stopped

VOCAB_SIZE = 405
ROWS = [[(40, 20), (30, 10), (100, 50)], [(120, 100)]]  # (prefix, response) of the examples of a row
SMALL = Plan(60, (1e-3, 2e-3), 3, 2)


def made_row(run):
    """What training would return: a Transformer likes the higher rate, and seeds differ by 0.1."""
    loss = (1.0 if run.model == "hrm" else 2.0) + 0.1 * (run.seed % 3) + (run.lr == (
        1e-3 if run.model == "transformer" else 2e-3))
    return dict(model=run.model, lr=run.lr, seed=run.seed, steps=9, of_budget=1.0, parameters=1000,
                flops=[1e9, 2e9], loss=[loss + 1, loss], exact=[0.0, 1 / loss])


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=["full", "quick"])
def test_every_architecture_has_the_flops_of_the_hrm(plan):
    steps = {}
    for model in plan.models:
        steps[model], ratio = steps_of(plan, model, VOCAB_SIZE, ROWS)
        assert abs(ratio - 1) <= 0.01
    assert steps["hrm"] == plan.hrm_steps and steps["transformer"] > 2 * plan.hrm_steps
    assert FULL.models == tuple(MODEL_TYPES)


def test_all_but_one_have_as_many_weights():
    sizes = {model: architecture_of(model, VOCAB_SIZE).num_parameters for model in MODEL_TYPES}
    assert len({*sizes.values()}) == 2 and sizes.pop("trm_match_recurrence") < min(sizes.values())


def test_an_interrupted_comparison_goes_on_and_ends_as_a_whole_one(tmp_path, capsys):
    trained = []

    def train(run):
        if len(trained) in (3, 15):  # once among the rates, once among the seeds
            trained.append(None)
            raise Stopped(128 + 15)
        trained.append(run)
        return made_row(run)
    for _ in range(2):
        with pytest.raises(Stopped):
            all_runs(SMALL, tmp_path / "a", {"data": "x"}, train)
    assert [line for line in capsys.readouterr().err.splitlines() if line] == [
        "rates 4/12: stopped; the same command goes on with this run",
        "seeds 3/12: stopped; the same command goes on with this run"]
    rows = all_runs(SMALL, tmp_path / "a", {"data": "x"}, train)
    best = {model: 2e-3 if model == "transformer" else 1e-3 for model in SMALL.models}
    assert [run for run in trained if run] == [*SMALL.trials(), *SMALL.repeats(best)]  # none twice, none left out
    assert rows == all_runs(SMALL, tmp_path / "b", {"data": "x"}, made_row)
    assert {model: [run["seed"] for run in runs] for model, runs in chosen(SMALL, rows).items()} == {
        model: [1234, 1235, 1236] for model in SMALL.models}
    line = next(line for line in figures(SMALL, rows) if line["model"] == "transformer")
    assert (line["lr"], line["seeds"]) == (2e-3, 3) and line["loss"] == pytest.approx(2.1)
    assert line["loss_error"] == pytest.approx(0.1 / 3 ** 0.5)
    assert table(SMALL, rows).splitlines()[2].startswith("| HRM (`hrm`) | 0.00 | 9 | 0.00 | 0.001 | 1.1000 ± 0.0577 |")


def test_a_rate_that_diverges_is_never_the_best():
    rows = [dict(model="hrm", lr=lr, loss=[loss]) for lr, loss in ((4e-3, float("nan")), (2e-3, 1.0), (1e-3, 2.0))]
    assert best_rates(rows) == {"hrm": 2e-3}
    with pytest.raises(ConfigError, match="--rates: hrm ends without a finite loss at all of them"):
        best_rates(rows[:1])


def test_a_seed_that_diverges_is_in_the_table_as_no_number():
    rows = [made_row(run) for run in (*SMALL.trials(), *SMALL.repeats(dict.fromkeys(SMALL.models, 1e-3)))]
    rows[-1]["loss"][-1] = float("nan")
    line = next(line for line in figures(SMALL, rows) if line["model"] == rows[-1]["model"])
    assert math.isnan(line["loss"]) and math.isnan(line["loss_error"]) and math.isfinite(line["exact_error"])
    assert "| nan ± nan | " in table(SMALL, rows) and draw(chosen(SMALL, rows)).startswith(b"\x89PNG")


def test_what_was_given_replaces_what_is_planned():
    plan = chosen_plan(parse_arguments(["--hrm-steps", "5", "--rates", "0.01", "--seeds", "1", "--models", "hrm"]),
                       FULL, QUICK)
    assert plan == Plan(5, [0.01], 1, FULL.points, ["hrm"])


@pytest.mark.parametrize(("flags", "message"), [
    (["--seeds", "0"], "--seeds 0: must be at least 1"),
    (["--rates", "3"], "--rates 3: a learning rate is between 0 and 1"),
    (["--models", "hrm", "gru"], "--models gru: choose from hrm, transformer"),
    (["--models", "hrm", "hrm"], "one is given twice"),
    (["--quick", "--seeds", "2"], "--quick has sizes of its own; leave it or --seeds out"),
    ([], "no stores/train.json in it; run `make demo`"),
])
def test_a_comparison_that_cannot_be_is_refused_in_one_line(tmp_path, capsys, flags, message):
    assert main(["--demo", str(tmp_path), "--output", str(tmp_path / "out"), *flags]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_quick_from_questions_to_the_picture(tmp_path, capsys):
    from examples.demo.questions import write_questions
    from examples.demo.run import make_stores

    write_questions(tmp_path / "demo" / "questions", 300, 110, 40)
    make_stores(tmp_path / "demo", tmp_path / "commands.log")
    assert main(["--demo", str(tmp_path / "demo"), "--output", str(tmp_path / "out"), "--quick"]) == 0
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [line["model"] for line in found] == [*QUICK.models] and "| HRM (`hrm`) | " in capsys.readouterr().out
    flops = [line["flops"] for line in found]
    assert max(flops) / min(flops) < 1.02  # each within 1 % of the HRM's
    assert (tmp_path / "out" / "architectures.png").stat().st_size > 1000
