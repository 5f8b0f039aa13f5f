"""Compare HRM with HRM-Text's baselines at equal FLOPs, on the demo's questions (`make demo` first).

Every architecture trains for the number of steps that costs the same counted FLOPs as the HRM's run (within 1 %), at
the best of the same learning rates, with several seeds for weights and rows. Prints and draws the validation loss and
the share of validation questions answered exactly right, against FLOPs. The same command resumes an interrupted
comparison.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it can be run by path

from hrm_megatron.program import listen, one_line, write_aside  # noqa: E402

if __name__ == "__main__":
    listen()

import numpy as np  # noqa: E402

from examples.compare_architectures.plan import Plan, Run, best_rates  # noqa: E402
from examples.demo.progress import minutes  # noqa: E402
from examples.recorded import recorded  # noqa: E402
from examples.study import Questions, check_pictures, chosen_plan, study_parser  # noqa: E402
from hrm_megatron.model_types import MODEL_TYPES  # noqa: E402

FULL = Plan(350, (1e-3, 2e-3, 4e-3), 3, 10)
QUICK = Plan(60, (2e-3,), 2, 2, ("hrm", "transformer"))
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    return one_line(lambda: compare(args))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = study_parser(__doc__, "compare_architectures", "few steps of two models, to see in minutes whether "
                                                            "everything runs")
    parser.add_argument("--hrm-steps", type=int, metavar="N",
                        help=f"steps of the HRM, whose FLOPs all have (default: {FULL.hrm_steps})")
    parser.add_argument("--rates", type=float, nargs="+", action="extend", metavar="LR",
                        help=f"learning rates (default: {FULL.rates})")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"(default: {FULL.seeds})")
    parser.add_argument("--models", nargs="+", action="extend", metavar="TYPE",
                        help=f"(default: {' '.join(FULL.models)})")
    return parser.parse_args(arguments)


def compare(args: argparse.Namespace) -> None:
    """Train all runs that are not recorded yet, and print and draw the results."""
    check_pictures()
    began, plan, questions = time.monotonic(), chosen_plan(args, FULL, QUICK), Questions.of(args.demo)
    from examples.compare_architectures import picture, train
    from hrm_megatron.parallel.single import single_rank

    with single_rank():
        rows = all_runs(plan, args.output, dict(asdict(plan), data=questions.digest),
                        lambda run: train.train(plan, run, questions))
    print(f"this start took {minutes(time.monotonic() - began)}\n\n{table(plan, rows)}", flush=True)
    write_aside(args.output / "table.json", json.dumps(figures(plan, rows), indent=1) + "\n")
    write_aside(args.output / "architectures.png", picture.draw(chosen(plan, rows)))
    print(f"written: {args.output / 'table.json'}, {args.output / 'architectures.png'}", flush=True)


def all_runs(plan: Plan, folder: Path, settings: Mapping[str, Any], train: Callable[[Run], Row]) -> list[Row]:
    """Return the rows of all runs: those that search for the best rates, then the other seeds at these."""
    rows = recorded(folder / "rates.jsonl", settings, plan.trials(), train, described)
    best = best_rates(rows)
    return rows + recorded(folder / "seeds.jsonl", dict(settings, best=best), plan.repeats(best), train, described)


def described(row: Row) -> str:
    return (f"{row['model']}, lr {row['lr']:g}, seed {row['seed']}: {row['steps']} steps, {row['flops'][-1]:.3g} FLOPs "
            f"({row['of_budget'] - 1:+.2%} as planned), loss {row['loss'][-1]:.4f}, {row['exact'][-1]:.1%} exact")


def chosen(plan: Plan, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the runs of each model at its best rate, one per seed."""
    best = best_rates(rows[:len(plan.trials())])
    return {model: [row for row in rows if (row["model"], row["lr"]) == (model, best[model])] for model in plan.models}


def figures(plan: Plan, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the data of the table: mean and standard error over the seeds; NaN if one diverged; error None with one
    seed."""
    found = []
    for model, runs in chosen(plan, rows).items():
        line = dict(model=model, parameters=runs[0]["parameters"], lr=runs[0]["lr"], steps=runs[0]["steps"],
                    flops=statistics.fmean(run["flops"][-1] for run in runs), seeds=len(runs))
        for name in ("loss", "exact"):
            ends = [run[name][-1] for run in runs]
            error = float(np.std(ends, ddof=1)) / len(ends) ** 0.5 if len(ends) > 1 else None
            line |= {name: statistics.fmean(ends), f"{name}_error": error}
        found.append(line)
    return found


def table(plan: Plan, rows: Sequence[Row]) -> str:
    """Return a Markdown table, most accurate model first."""
    lines = ["| model | weights, M | steps | FLOPs, 1e12 | rate | loss | exactly right, % |",
             "|---|---|---|---|---|---|---|"]
    for line in sorted(figures(plan, rows), key=lambda line: -line["exact"]):
        errors = [f" ± {scale * line[name]:.{digits}f}" if line[name] is not None else ""
                  for name, scale, digits in (("loss_error", 1, 4), ("exact_error", 100, 1))]
        lines.append(f"| {MODEL_TYPES[line['model']].title} (`{line['model']}`) | {line['parameters'] / 1e6:.2f} | "
                     f"{line['steps']} | {line['flops'] / 1e12:.2f} | {line['lr']:g} | {line['loss']:.4f}{errors[0]} | "
                     f"{100 * line['exact']:.1f}{errors[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
