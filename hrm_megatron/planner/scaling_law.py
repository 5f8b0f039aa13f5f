"""Fit the scaling law of loss over parameters and tokens: `L(N, D) = E + A / N^alpha + B / D^beta`.

The form is equation 2 of Hoffmann et al., arXiv 2203.15556. For given exponents it is linear in E, A and B, which are
solved for exactly with none negative; only the two exponents are searched, on a grid and then on finer grids around its
best point (variable projection, arXiv 2603.22339). So the fit has no starting point to depend on and no early stop,
which distorted the fit of the first paper (arXiv 2404.10102). A grid is refined only once its best point lies inside
it, since the valley of low error is long and narrow. The objective is the squared error relative to the measured loss.
"""
from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrm_megatron.config import ConfigError

EXPONENTS = (0.02, 2.0)  # smallest and largest tried
POINTS, FINER_POINTS = 25, 13  # per axis of the first grid and of the finer ones
FINEST, MOST_GRIDS = 1e-6, 200  # last grid step, in log(exponent); takes about 15 grids
LEAST_SIZE, MOST_SIZE = 1e-40, 1e40  # of parameters, tokens, loss and FLOPs, so that their powers stay finite
LEAST_RUNS, LEAST_SIZES = 6, 3  # five numbers are fitted
LEAST_SHARE = 1e-6  # of a loss: terms smaller than this in every run are rounding
MOST_CORRELATION = 0.99  # of log(parameters) and log(tokens), up to which their terms can be separated


@dataclass(frozen=True)
class Run:
    """One trained model; `flops` are those of its whole training, if known. Held-out runs are predicted, not fitted."""

    parameters: float
    tokens: float
    loss: float
    model: str = ""
    flops: float | None = None
    held_out: bool = False


@dataclass(frozen=True)
class Law:
    """The five fitted numbers."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Predict the loss of a model with `parameters` after `tokens`."""
        return float(self.e + self.a * parameters ** -self.alpha + self.b * tokens ** -self.beta)

    def best_size(self, flops: float, flops_per_parameter_token: float) -> tuple[float, float]:
        """Return the compute-optimal (parameters, tokens) for `flops` = k N D (arXiv 2203.15556, equation 4); infinite
        or zero if one of the two terms was fitted as zero or nearly so."""
        product, both = math.log(flops / flops_per_parameter_token), self.alpha + self.beta
        if not self.a or not self.b:
            return (math.inf, 0.0) if self.a else (0.0, math.inf)
        g = (math.log(self.alpha * self.a) - math.log(self.beta * self.b)) / both
        with np.errstate(over="ignore"):
            n, d = np.exp([g + product * self.beta / both, product * self.alpha / both - g])
        return float(n), float(d)


def read_runs(path: Path) -> list[Run]:
    """Read runs from a jsonl file; raises ConfigError with file and line of an invalid row."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a jsonl file of runs") from error
    runs = [_run(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not runs:
        raise ConfigError(f"{path}: holds no runs; a row is " + json.dumps(vars(Run(1e6, 1e8, 2.5, "hrm"))))
    return runs


def _run(line: str, place: str) -> Run:
    try:
        row: Any = json.loads(line)
        run = Run(**{name: row[name] for name in Run.__dataclass_fields__ if name in row})
        if not isinstance(row, Mapping) or not all(is_size(value) for value in (
                run.parameters, run.tokens, run.loss, 1 if run.flops is None else run.flops)):
            raise ValueError("parameters, tokens, loss and flops are numbers above 0, from "
                             f"{LEAST_SIZE:g} to {MOST_SIZE:g}")
        if not isinstance(run.held_out, bool) or not isinstance(run.model, str):
            raise ValueError("held_out is true or false, model a text")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place}: is no run ({error})") from error
    return run


def is_size(value: object) -> bool:
    """Whether a value is a number from LEAST_SIZE to MOST_SIZE."""
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST_SIZE <= value <= MOST_SIZE


def fit(runs: Sequence[Run]) -> Law:
    """Fit the law to runs of one model, without the held-out ones; raises ConfigError if they are too few."""
    fitted = [run for run in runs if not run.held_out]
    sizes = [len({getattr(run, name) for run in fitted}) for name in ("parameters", "tokens")]
    if len(fitted) < LEAST_RUNS or min(sizes) < LEAST_SIZES:
        raise ConfigError(f"{runs[0].model or 'model'}: {len(fitted)} runs of {sizes[0]} sizes and {sizes[1]} numbers "
                          f"of tokens: five numbers are fitted; train at least {LEAST_RUNS}, of {LEAST_SIZES} sizes "
                          "and numbers of tokens")
    return _fit(*(np.array([getattr(run, name) for run in fitted], float) for name in ("parameters", "tokens", "loss")))


def undetermined(law: Law, runs: Sequence[Run]) -> list[str]:
    """Return a line for each reason why these runs do not determine some number of the fitted law."""
    fitted = [run for run in runs if not run.held_out]
    low, high = EXPONENTS
    found = []
    for factor, exponent, size in (("a", "alpha", "parameters"), ("b", "beta", "tokens")):
        value = getattr(law, exponent)
        if all(getattr(law, factor) * getattr(run, size) ** -value < LEAST_SHARE * run.loss for run in fitted):
            found.append(f"{size} make no difference to these losses: {factor.upper()} is 0, {exponent} could be any")
        elif not low * 1.01 < value < high / 1.01:
            found.append(f"{exponent} stands at the edge of what was tried: these runs do not determine it")
    n, d = (np.log([getattr(run, size) for run in fitted]) for size in ("parameters", "tokens"))
    if np.corrcoef(n, d)[0, 1] > MOST_CORRELATION:
        found.append("parameters and tokens grow together in these runs, so that alpha and beta may be each other's: "
                     "train some that differ in one alone")
    return found


def _fit(parameters: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> Law:
    # Centred, so that the columns of the linear problem have similar scale whatever the exponents.
    middle_n, middle_d = (math.exp(np.log(x).mean()) for x in (parameters, tokens))
    n, d = np.log(parameters / middle_n), np.log(tokens / middle_d)
    low, high = (math.log(exponent) for exponent in EXPONENTS)
    centre, reach, step, least = [(low + high) / 2] * 2, (high - low) / 2, (high - low) / (POINTS - 1), math.inf
    for _ in range(MOST_GRIDS):
        points = POINTS if least == math.inf else FINER_POINTS
        axes = [np.linspace(max(low, middle - reach), min(high, middle + reach), points) for middle in centre]
        of_n, of_d = (np.exp(-np.exp(axis)[:, None] * x) for axis, x in zip(axes, (n, d), strict=True))
        errors, coefficients = _solve(of_n, of_d, losses)
        place = np.unravel_index(errors.argmin(), errors.shape)
        best = [float(axis[index]) for axis, index in zip(axes, place, strict=True)]
        if better := errors[place] < least:
            least, centre, (e, a, b) = errors[place], best, coefficients[place]
        if better and any(x in (axis[0], axis[-1]) and low < x < high for x, axis in zip(best, axes, strict=True)):
            continue  # at the border: repeat the grid around it
        if step < FINEST:
            break
        reach, step = 2 * step, 4 * step / (FINER_POINTS - 1)
    alpha, beta = map(math.exp, centre)
    return Law(float(e), float(a * middle_n ** alpha), float(b * middle_d ** beta), alpha, beta)


def _solve(of_n: np.ndarray, of_d: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve for E, A and B at every pair of exponents: of_n [p, r] and of_d [q, r] of r runs to errors [p, q] and
    coefficients [p, q, 3]. The non-negative optimum is the best non-negative solution over all subsets of terms."""
    p, q = len(of_n), len(of_d)
    columns = np.empty((p, q, 3, len(losses)))
    columns[:, :, 0], columns[:, :, 1], columns[:, :, 2] = 1, of_n[:, None], of_d[None]
    columns /= losses
    best, found = np.full((p, q), np.inf), np.zeros((p, q, 3))
    for terms in itertools.chain.from_iterable(itertools.combinations(range(3), count) for count in (1, 2, 3)):
        x = columns[:, :, list(terms)]
        solved = np.linalg.pinv(x.swapaxes(-1, -2)).sum(-1)  # targets are loss / loss = 1
        errors = np.square(np.einsum("pqt,pqtr->pqr", solved, x) - 1).mean(-1)
        better = (solved >= 0).all(-1) & (errors < best)
        best[better] = errors[better]
        found[better] = 0
        rows, cols = np.nonzero(better)
        found[rows[:, None], cols[:, None], list(terms)] = solved[better]
    return best, found


def resampled(runs: Sequence[Run], count: int, seed: int) -> Iterator[Law]:
    """Yield `count` fits to runs drawn with replacement (bootstrap); draws with too few sizes are repeated."""
    fitted = [run for run in runs if not run.held_out]
    rng = np.random.default_rng(seed)
    while count:
        drawn = [fitted[index] for index in rng.integers(0, len(fitted), len(fitted))]
        if min(len({run.parameters for run in drawn}), len({run.tokens for run in drawn})) >= LEAST_SIZES:
            count -= 1
            yield fit(drawn)
