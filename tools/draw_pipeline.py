"""Draw how a step of an HRM goes through a pipeline, by the simulation that chooses its schedule.

    python tools/draw_pipeline.py --stages 4 --microbatches 8 --output docs/pipeline.png
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from hrm_megatron.model.schedule import unroll
from hrm_megatron.parallel.simulate import Estimate, stock, two_phase

FORWARD, NO_GRADIENT, BACKWARD = "#4c78a8", "#b6cbe3", "#f58518"


def draw_row(axes: Axes, title: str, found: Estimate, with_grad: list[bool]) -> None:
    """Draw one schedule: a line per stage, a bar per operation, with its tick inside."""
    for stage, timeline in enumerate(found.timelines):
        for operation, start, end in timeline:
            if end == start:
                continue  # zeros that a tick without gradient answers
            color = BACKWARD if operation.backward else FORWARD if with_grad[operation.tick] else NO_GRADIENT
            axes.barh(stage, end - start, left=start, color=color, edgecolor="white", linewidth=0.3)
            if operation.microbatch == 0:
                axes.text((start + end) / 2, stage, str(operation.tick), ha="center", va="center", fontsize=5)
    axes.set_title(f"{title}: bubble {found.bubble:.1%}, {found.live_graphs} ticks alive on a stage", fontsize=9)
    stages = range(len(found.timelines))
    axes.set_yticks(stages, [f"stage {stage}" for stage in stages], fontsize=7)
    axes.invert_yaxis()


def draw(stages: int, microbatches: int, bp_steps: int, output: Path) -> None:
    """Write a picture of both schedules, one under the other, on one axis of time."""
    with_grad = [tick.with_grad for tick in unroll(2, 3, bp_steps)]
    figure, rows = plt.subplots(2, 1, figsize=(14, 1.2 + 0.7 * stages), sharex=True, layout="constrained")
    for axes, title, schedule in ((rows[0], "one phase", stock), (rows[1], "two phases", two_phase)):
        draw_row(axes, title, schedule(microbatches, with_grad, stages), with_grad)
    rows[1].set_xlabel(f"time, in forwards of a tick on a stage; bp {bp_steps}, {microbatches} micro-batches. Light: a "
                       "tick without gradient, dark: with, orange: backward. Figures: ticks of micro-batch 0",
                       fontsize=8)
    figure.savefig(output, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--bp-steps", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("docs/pipeline.png"))
    args = parser.parse_args()

    def run() -> None:
        draw(args.stages, args.microbatches, args.bp_steps, args.output)
        print(args.output)
    return one_line(run)


if __name__ == "__main__":
    sys.exit(main())
