"""Fits of scaling laws: laws that made the runs come back, and what the runs do not tell is said."""
from __future__ import annotations

import json
import math
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.planner.scaling_law import Law, Run, fit, read_runs, resampled, undetermined
from tests.tools import load_tool

ROOT = Path(__file__).parents[2]
# Hoffmann et al., arXiv 2203.15556, equation 10, and the same with a steep and a flat exponent and without a floor.
LAWS = [Law(1.69, 406.4, 410.7, 0.34, 0.28), Law(0.5, 3e4, 20, 0.8, 0.15), Law(0, 406.4, 410.7, 0.34, 0.28)]
SIZES, TOKENS = (2e5, 5e5, 1e6, 2e6, 5e6), (2e6, 8e6, 3e7, 1e8)


def made_by(law: Law, noise: float = 0.0, model: str = "") -> list[Run]:
    rng = random.Random(0)
    return [Run(n, d, law.loss(n, d) * math.exp(rng.gauss(0, noise)), model, 30 * n * d) for n in SIZES for d in TOKENS]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_law_that_made_the_runs_comes_back(law):
    """The last grid has steps of 1e-5 of an exponent and less, to which every other number is known."""
    found = fit(made_by(law))
    for name in ("alpha", "beta", "a", "b"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-3)
    assert found.e == pytest.approx(law.e, abs=1e-4) and not undetermined(found, made_by(law))
    assert found.loss(1e8, 1e10) == pytest.approx(law.loss(1e8, 1e10), rel=1e-3)


def test_random_laws_come_back():
    """The lowest errors lie in a long and narrow valley, which a grid of one size would leave too early."""
    rng = random.Random(1)
    for _ in range(40):
        alpha, beta = rng.uniform(0.08, 1.2), rng.uniform(0.08, 1.2)
        law = Law(rng.choice([0, rng.uniform(0.2, 2.5)]), rng.uniform(0.3, 3) * 1e6 ** alpha,
                  rng.uniform(0.3, 3) * 2e7 ** beta, alpha, beta)
        found = fit(made_by(law))
        assert (found.alpha, found.beta) == pytest.approx((alpha, beta), rel=1e-4), law


def test_the_smallest_and_largest_sizes_are_fitted():
    rng = random.Random(3)
    for low, high in ((-40, -39), (-40, 40), (39, 40)) * 3:
        n, d = ([10 ** rng.uniform(low, high) for _ in range(3)] for _ in range(2))
        law = fit([Run(one, other, 10 ** rng.uniform(low, high)) for one in n for other in d])
        assert all(map(math.isfinite, vars(law).values()))


def test_terms_are_never_negative():
    """Loss that rises with the size: there is no such term, and no model is large enough."""
    runs = [Run(n, d, 2 + 1e-7 * n + 30 * d ** -0.3) for n in SIZES for d in TOKENS]
    found = fit(runs)
    assert found.a == 0 and found.b > 0 and found.best_size(1e20, 6) == (0.0, math.inf)


def test_a_run_that_is_held_out_changes_nothing():
    runs = made_by(LAWS[0])
    assert fit([*runs, Run(1e9, 1e10, 99.0, held_out=True)]) == fit(runs)


def test_the_best_size_is_the_lowest_on_the_line_of_equal_cost():
    law, cost = LAWS[0], 30
    n, d = law.best_size(1e20, cost)
    assert cost * n * d == pytest.approx(1e20)
    assert all(law.loss(n * scale, d / scale) > law.loss(n, d) for scale in (0.9, 0.99, 1.01, 1.1))


def test_the_spread_of_resampled_fits_holds_the_law():
    laws = list(resampled(made_by(LAWS[0], noise=0.002), 20, seed=1))
    assert len(laws) == 20 and laws == list(resampled(made_by(LAWS[0], noise=0.002), 20, seed=1))
    predicted = sorted(law.loss(1e7, 3e8) for law in laws)
    assert predicted[0] < LAWS[0].loss(1e7, 3e8) < predicted[-1]


def grid(loss) -> list[Run]:
    return [Run(n, d, loss(n, d), flops=30 * n * d) for n in SIZES for d in TOKENS]


@pytest.mark.parametrize("runs, said", [
    (grid(lambda n, d: 1 + 1e13 / n ** 2.5 + 30 * d ** -0.3), ["alpha stands at the edge"]),
    (grid(lambda n, d: 2 + 100 / d ** 0.3), ["parameters make no difference"]),
    (grid(lambda n, d: 2 + 100 / n ** 0.3), ["tokens make no difference"]),
    (grid(lambda n, d: 2.5), ["parameters make no difference", "tokens make no difference"]),
    (grid(lambda n, d: 2 + 1e-7 * n + 1e-8 * d), ["parameters make no difference", "tokens make no difference"]),
    ([Run(n, 20 * n, LAWS[0].loss(n, 20 * n), flops=600 * n * n) for n in (*SIZES, 1e7, 3e7)],
     ["parameters and tokens grow together"]),
], ids=["steep", "no parameters", "no tokens", "constant", "rising", "along a line"])
def test_what_the_runs_do_not_determine_is_said_and_not_answered(tmp_path, monkeypatch, capsys, runs, said):
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(vars(run)) + "\n" for run in runs))
    monkeypatch.setattr(sys, "argv", ["fit_scaling.py", "--input", str(tmp_path / "runs.jsonl"), "--resamples", "3",
                                      "--json", str(tmp_path / "law.json")])
    assert runpy.run_path(str(ROOT / "tools" / "fit_scaling.py"))["main"]() == 0
    remarks = json.loads((tmp_path / "law.json").read_text())[""]["undetermined"]
    printed = capsys.readouterr().out
    assert len(remarks) == len(said) and all(map(str.startswith, remarks, said))
    assert all(f"  {remark}\n" in printed for remark in remarks)
    assert "  no lowest loss for a number of FLOPs: " in printed and "  lowest loss for" not in printed


def test_the_size_of_lowest_loss_has_the_spread_of_the_resampled_fits():
    lowest = load_tool("fit_scaling").lowest
    law, one_term = LAWS[0], Law(2.0, 0.0, 100.0, 0.3, 0.3)
    n, d = law.best_size(1e20, 30)
    steeper = Law(law.e, law.a, law.b, 0.35, law.beta)
    low, high = sorted((n, steeper.best_size(1e20, 30)[0]))
    assert lowest(law, [], 1e20, 30) == f"{n:.3g} parameters, {d:.3g} tokens"
    assert lowest(one_term, [], 1e20, 30) == "not determined, as the fit has only one of the two terms"
    assert lowest(law, [law, steeper], 1e20, 30).startswith(f"{n:.3g} parameters ({low:.3g} to {high:.3g}), ")
    assert lowest(law, [law] * 9 + [one_term], 1e20, 30).startswith("not determined")
    assert lowest(law, [law, Law(2.0, 1e-300, 100.0, 0.02, 0.02)], 1e20, 30).startswith("not determined")


def test_without_resampled_fits_no_spread_is_printed(capsys):
    predicted = load_tool("fit_scaling").describe(made_by(LAWS[0]), 0, 0, [(1e9, 1e11)])["predictions"][0]
    assert (predicted["low"], predicted["high"]) == (None, None)
    printed = capsys.readouterr().out
    assert f"1e+11 tokens: predicted {predicted['predicted']:.4f}\n" in printed and " to " not in printed


@pytest.mark.parametrize("row, message", [
    ('{"parameters": 1, "tokens": 2}', ":1: is no run"), ("[1]", ":1: is no run"), ("{", ":1: is no run"),
    ('{"parameters": 1, "tokens": 2, "loss": NaN}', "are numbers above 0"),
    (f'{{"parameters": 1{"0" * 400}, "tokens": 2, "loss": 3}}', "from 1e-40 to 1e[+]40"),
    ('{"parameters": 1, "tokens": 2, "loss": 1e-320}', "from 1e-40 to 1e[+]40"),
    ('{"parameters": true, "tokens": 2, "loss": 1}', "are numbers above 0"),
    ('{"parameters": 1, "tokens": 2, "loss": "3"}', "are numbers above 0"),
    ('{"parameters": 1, "tokens": 2, "loss": 3, "held_out": 1}', "held_out is true or false"),
    ("", "holds no runs"), (None, "cannot be read"),
])
def test_rows_that_are_no_runs_are_refused(tmp_path, row, message):
    if row is not None:
        (tmp_path / "runs.jsonl").write_text(row)
    with pytest.raises(ConfigError, match=message):
        read_runs(tmp_path / "runs.jsonl")


def test_too_few_runs_are_refused():
    with pytest.raises(ConfigError, match="4 runs of 1 sizes and 4 numbers of tokens"):
        fit(made_by(LAWS[0])[:4])


def test_the_tool_prints_prediction_and_measurement_side_by_side(tmp_path):
    runs = [*made_by(LAWS[0], model="hrm"), *made_by(LAWS[1], model="transformer"),
            Run(2e7, 4e8, LAWS[0].loss(2e7, 4e8), "hrm", held_out=True)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(vars(run)) + "\n" for run in runs))

    def tool(*flags: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "tools/fit_scaling.py", "--input", tmp_path / "runs.jsonl", *flags],
                              cwd=ROOT, capture_output=True, text=True)
    done = tool("--resamples", "3", "--json", tmp_path / "law.json", "--png", tmp_path / "law.png",
                "--predict", "1e9", "1e11")
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("hrm: L(N, D) = 1.69 + ") and first.endswith("20 runs, at most 0.00% away")
    assert any(line.startswith("  2e+07 parameters, 4e+08 tokens: predicted ") and line.endswith("0.00%")
               for line in rest) and any(line.startswith("transformer: ") for line in rest)
    found = json.loads((tmp_path / "law.json").read_text())["hrm"]
    assert [one["measured"] is None for one in found["predictions"]] == [False, True]
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "runs.jsonl").write_text("{}")
    refused = tool()
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and ":1: is no run" in refused.stderr


@pytest.mark.parametrize("flags, said", [
    (["--resamples", "-1"], "--resamples -1: give a number of fits"),
    (["--seed", "-1"], "--seed -1: must not be negative"),
    (["--predict", "0", "1e9"], "--predict 0 1e[+]09: parameters and tokens are numbers above 0"),
    (["--predict", "1e9", "1e300"], "--predict 1e[+]09 1e[+]300: .* from 1e-40 to 1e[+]40"),
    (["--predict", "1e9", "nan"], "--predict 1e[+]09 nan: parameters"),
    (["--png", "law.pdf"], "--png law.pdf: the name of this file must end with .png"),
    ([], "hrm: 2 runs of 1 sizes and 2 numbers of tokens")])
def test_the_tool_refuses_in_one_line(tmp_path, monkeypatch, capsys, flags, said):
    (tmp_path / "runs.jsonl").write_text("".join(
        json.dumps(dict(parameters=1e6, tokens=tokens, loss=3.0, model="hrm")) + "\n" for tokens in (1e7, 1e8)))
    monkeypatch.setattr(sys, "argv", ["fit_scaling.py", "--input", str(tmp_path / "runs.jsonl"), *flags])
    assert runpy.run_path(str(ROOT / "tools" / "fit_scaling.py"))["main"]() == 1
    assert re.match(f"error: {said}.*\n$", capsys.readouterr().err)
