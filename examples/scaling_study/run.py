"""Predict a larger model from small ones: train five sizes at several numbers of tokens, fit L(N, D), and train the
held-out model that the law has predicted. HRM and Transformer, on the demo's questions (`make demo` first).

The learning rate is searched at the narrowest width and transferred by the rule rate x width = constant, for all
weights; at other widths the same multiples of the rule's rate are tried, to test whether the best one stays the same.
The same command resumes an interrupted study with the run that was in progress.
"""
from __future__ import annotations

import argparse
import json
import math
import os
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

from examples.demo.commands import CommandFailed, python, run  # noqa: E402
from examples.demo.progress import minutes  # noqa: E402
from examples.recorded import recorded  # noqa: E402
from examples.scaling_study.plan import FIRST_LR, Run, Study, best_multiples  # noqa: E402
from examples.study import Questions, check_pictures, chosen_plan, study_parser  # noqa: E402

FULL = Study((64, 96, 160, 224, 320), (90_112, 180_224, 359_424, 716_800), 416, (64, 160, 320))
QUICK = Study((32, 48, 64), (2048, 3072, 4096), 80, (32,), multiples=(1.0, 2.0))
Trainer = Callable[[Run], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    return one_line(lambda: study(args), (CommandFailed,))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = study_parser(__doc__, "scaling_study", "tiny models and a few steps, to see whether everything runs; its "
                                                    "law means nothing")
    parser.add_argument("--widths", type=int, nargs="+", action="extend", metavar="H",
                        help=f"hidden sizes (default: {FULL.widths})")
    parser.add_argument("--tokens", type=int, nargs="+", action="extend", metavar="N", help=f"(default: {FULL.tokens})")
    parser.add_argument("--held-out-width", type=int, metavar="H", help=f"(default: {FULL.held_out_width})")
    parser.add_argument("--lr-widths", type=int, nargs="+", action="extend", metavar="H",
                        help=f"where all multiples of the rate are tried (default: {FULL.lr_widths})")
    return parser.parse_args(arguments)


def study(args: argparse.Namespace) -> None:
    """Train all runs that are not recorded yet, and print the results."""
    check_pictures()
    began, planned, questions = time.monotonic(), chosen_plan(args, FULL, QUICK), Questions.of(args.demo)
    from examples.scaling_study import train
    from hrm_megatron.parallel.single import single_rank

    settings = dict(asdict(planned), first_lr=FIRST_LR, data=questions.digest)
    with single_rank():
        rows = all_runs(planned, args.output, settings, lambda one: train.train(one, questions))
    print(f"{len(rows)} runs in {args.output / 'runs.jsonl'}; this start took {minutes(time.monotonic() - began)}\n",
          flush=True)
    write_aside(args.output / "fitted.jsonl", "".join(json.dumps(row) + "\n" for row in converged(rows)))
    run(python(os.path.relpath(ROOT / "tools" / "fit_scaling.py"), "--input", args.output / "fitted.jsonl", "--png",
               args.output / "law.png", "--json", args.output / "law.json"), args.output / "commands.log", str.rstrip)


def all_runs(planned: Study, folder: Path, settings: Mapping[str, Any], train: Trainer) -> list[dict[str, Any]]:
    """Search the rates, print the best ones, and return the rows of the fitted and the held-out runs."""
    trials = recorded(folder / "rates.jsonl", settings, planned.trials(), train, described)
    best = best_multiples(planned, [trial["loss"] for trial in trials])
    print(rates_table(planned, [trial["loss"] for trial in trials]), flush=True)
    narrowest = {model: best[model, min(planned.widths)] for model in planned.models}
    for model, multiple in narrowest.items():
        others = {width: best[model, width] for width in planned.lr_widths if best[model, width] != multiple}
        said = "the best at every width that was tried" if not others else "the best at the narrowest; " + ", ".join(
            f"at width {width} it is {found:g}" for width, found in others.items())
        print(f"{model}: {multiple:g} x the rule's rate is {said}", flush=True)
    return recorded(folder / "runs.jsonl", dict(settings, multiples=narrowest), list(planned.runs(narrowest)), train,
                    described)


def converged(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of runs that converged; print the others."""
    for row in rows:
        if not math.isfinite(row["loss"]):
            print(f"left out of the fit: {described(row)}: it diverged, at a rate that is the best of those tried at "
                  "the narrowest width with the fewest tokens", flush=True)
    return [row for row in rows if math.isfinite(row["loss"])]


def described(row: Mapping[str, Any]) -> str:
    return (f"{row['model']} of width {row['width']}, {row['parameters'] / 1e6:.2f} M parameters, {row['tokens']:,} "
            f"tokens, lr {row['lr']:.3g}: loss {row['loss']:.4f}")


def rates_table(planned: Study, losses: Sequence[float]) -> str:
    """Return a Markdown table of the loss at every multiple of the rule's rate and every width tried."""
    lines = ["", "| model | width | " + " | ".join(f"{multiple:g} x" for multiple in planned.multiples) + " |",
             "|---|---|" + "---|" * len(planned.multiples)]
    left, best = iter(losses), best_multiples(planned, losses)
    for model in planned.models:
        for width in sorted(planned.lr_widths):
            cells = [f"**{next(left):.4f}**" if multiple == best[model, width] else f"{next(left):.4f}"
                     for multiple in planned.multiples]
            lines.append(f"| {model} | {width} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
