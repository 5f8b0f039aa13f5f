"""Fit a scaling law to runs, predict the held-out runs, and draw both.

    python tools/fit_scaling.py --input runs.jsonl --png law.png --predict 1e9 4e10

A row of the input is {"parameters": 1.2e6, "tokens": 3e7, "loss": 2.31} and may have "model" (one law is fitted per
model), "flops" of the whole training, and "held_out": true for a run that is predicted, not fitted.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hrm_megatron.program import check_outputs, listen, one_line, whole_file, write_aside

if __name__ == "__main__":
    listen()

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.write_report import can_draw
from hrm_megatron.planner.scaling_law import (
    LEAST_SIZE,
    MOST_SIZE,
    Law,
    Run,
    fit,
    is_size,
    read_runs,
    resampled,
    undetermined,
)

MIDDLE = (5, 95)  # percentiles of the resampled fits that are printed


def describe(runs: list[Run], samples: int, seed: int, predict: list[tuple[float, float]]) -> dict[str, Any]:
    """Fit one model's runs; print the law, its predictions and their errors; return all of it."""
    law, laws = fit(runs), list(resampled(runs, samples, seed))
    spread = {name: [float(x) for x in np.percentile([getattr(one, name) for one in laws], MIDDLE)]
              for name in Law.__dataclass_fields__} if laws else {}
    fitted = [run for run in runs if not run.held_out]
    away = [law.loss(run.parameters, run.tokens) / run.loss - 1 for run in fitted]
    print(f"{runs[0].model or 'model'}: L(N, D) = {law.e:.4g} + {law.a:.4g} / N^{law.alpha:.4g} + {law.b:.4g} / "
          f"D^{law.beta:.4g}; {len(fitted)} runs, at most {max(map(abs, away)):.2%} away")
    if spread:
        print(f"  {MIDDLE[1] - MIDDLE[0]}% of {samples} resampled fits: " + "; ".join(
            f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in spread.items()))
    remarks = undetermined(law, runs)
    for remark in remarks:
        print(f"  {remark}")
    found: dict[str, Any] = dict(law=vars(law), resampled=spread, undetermined=remarks, predictions=[])

    def say(parameters: float, tokens: float, loss: float | None) -> None:
        predicted = law.loss(parameters, tokens)
        low, high = (float(x) for x in np.percentile([one.loss(parameters, tokens) for one in laws], MIDDLE)) if laws \
            else (None, None)
        between = f" ({low:.4f} to {high:.4f})" if laws else ""
        measured = "" if loss is None else f", measured {loss:.4f}: {predicted / loss - 1:+.2%}"
        print(f"  {parameters:.3g} parameters, {tokens:.3g} tokens: predicted {predicted:.4f}{between}{measured}")
        found["predictions"].append(dict(parameters=parameters, tokens=tokens, predicted=predicted, low=low, high=high,
                                         measured=loss))
    for run in runs:
        if run.held_out:
            say(run.parameters, run.tokens, run.loss)
    for parameters, tokens in predict:
        say(parameters, tokens, None)
    costs = [run.flops / run.parameters / run.tokens for run in runs if run.flops is not None]
    if costs and remarks:
        print("  no lowest loss for a number of FLOPs: that takes a law which these runs determine")
    elif costs:
        for flops in (max(run.flops for run in runs if run.flops is not None) * scale for scale in (1, 10)):
            print(f"  lowest loss for {flops:.3g} FLOPs: {lowest(law, laws, flops, float(np.median(costs)))}")
    return found


def lowest(law: Law, laws: list[Law], flops: float, flops_per_parameter_token: float) -> str:
    """Return the compute-optimal size as text, with its spread among the resampled laws, if there are any."""
    sizes, ranges = law.best_size(flops, flops_per_parameter_token), ["", ""]
    if not all(map(is_size, sizes)):
        return "not determined, as the fit has only one of the two terms"
    if laws:
        spread = np.percentile([one.best_size(flops, flops_per_parameter_token) for one in laws], MIDDLE, axis=0,
                               method="nearest").T  # no interpolation: a size may be infinite
        if not all(map(is_size, spread.flat)):
            return "not determined, as resampled fits have only one of the two terms"
        ranges = [f" ({low:.3g} to {high:.3g})" for low, high in spread.tolist()]
    return ", ".join(f"{size:.3g} {name}{between}" for size, name, between in zip(
        sizes, ("parameters", "tokens"), ranges, strict=True))


def draw(runs: list[Run], laws: dict[str, Law], path: Path) -> None:
    """Draw loss against tokens, a line for each size of each model; held-out runs are hollow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(1, len(laws), figsize=(6 * len(laws), 4.5), sharey=True, layout="constrained",
                                squeeze=False)
    for axes, (model, law) in zip(rows[0], laws.items(), strict=True):
        own = [run for run in runs if run.model == model]
        tokens = np.geomspace(min(run.tokens for run in own), max(run.tokens for run in own), 100)
        for place, size in enumerate(sorted({run.parameters for run in own})):
            colour = plt.get_cmap("viridis")(place / max(1, len({run.parameters for run in own}) - 1))
            axes.plot(tokens, [law.loss(size, t) for t in tokens], color=colour, label=f"{size:.3g} parameters")
            for run in (run for run in own if run.parameters == size):
                axes.plot(run.tokens, run.loss, "o", color=colour, fillstyle="none" if run.held_out else "full")
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=model or "model")
        axes.legend(fontsize=8)
    rows[0][0].set_ylabel("loss; lines are the fit, hollow points were not fitted")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="jsonl of runs")
    parser.add_argument("--predict", type=float, nargs=2, action="append", default=[], metavar=("PARAMETERS", "TOKENS"))
    parser.add_argument("--resamples", type=int, default=100, help="of the bootstrap; 0 leaves it out (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--png", type=Path, help="where the picture goes; needs matplotlib (extra plan)")
    parser.add_argument("--json", type=Path, help="where all numbers go")
    args = parser.parse_args()

    def run() -> None:
        check_outputs({"--json": args.json, "--png": args.png}, inputs={"--input": args.input})
        if args.resamples < 0:
            raise ConfigError(f"--resamples {args.resamples}: give a number of fits, or 0 for none")
        if args.seed < 0:
            raise ConfigError(f"--seed {args.seed}: must not be negative")
        for sizes in args.predict:
            if not all(map(is_size, sizes)):
                raise ConfigError(f"--predict {sizes[0]:g} {sizes[1]:g}: parameters and tokens are numbers above 0, "
                                  f"from {LEAST_SIZE:g} to {MOST_SIZE:g}")
        if args.png and not can_draw():
            raise ConfigError(f'--png {args.png}: needs matplotlib, which is not installed; pip install -e ".[plan]"')
        runs = read_runs(args.input)
        found = {model: describe([run for run in runs if run.model == model], args.resamples, args.seed, args.predict)
                 for model in dict.fromkeys(run.model for run in runs)}
        if args.json:
            write_aside(args.json, json.dumps(found, indent=1) + "\n")
            print(f"written: {args.json}")
        if args.png:
            draw(runs, {model: Law(**one["law"]) for model, one in found.items()}, args.png)
            print(f"written: {args.png}")
    return one_line(run)


if __name__ == "__main__":
    sys.exit(main())
