"""Draw the pipeline schedules of an HRM's step, by the simulation that chooses between them.

    python tools/draw_pipeline.py --stages 4 --microbatches 8 --output docs/pipeline.png
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hrm_megatron.program import check_outputs, listen, one_line, whole_file

if __name__ == "__main__":
    listen()

from hrm_megatron.config import ConfigError
from hrm_megatron.data.write_report import can_draw
from hrm_megatron.model.ticks import unroll
from hrm_megatron.parallel.simulate import stock, two_phase


def draw(stages: int, microbatches: int, bp_steps: int, output: Path) -> None:
    """Write a picture of both schedules, one below the other, on one time axis."""
    import matplotlib.pyplot as plt

    from hrm_megatron.planner.picture import LEGEND, draw_schedule

    with_grad = [tick.with_grad for tick in unroll(2, 3, bp_steps)]
    figure, rows = plt.subplots(2, 1, figsize=(14, 1.2 + 0.7 * stages), sharex=True, layout="constrained")
    for axes, title, schedule in ((rows[0], "one phase", stock), (rows[1], "two phases", two_phase)):
        draw_schedule(axes, title, schedule(microbatches, with_grad, stages), with_grad)
    rows[1].set_xlabel(f"time, in forwards of a tick on a stage; bp {bp_steps}, {microbatches} micro-batches. "
                       f"{LEGEND}", fontsize=8)
    with whole_file(output) as partial:
        figure.savefig(partial, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--bp-steps", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("pipeline.png"), metavar="PNG",
                        help="(default: %(default)s)")
    args = parser.parse_args()

    def run() -> None:
        check_outputs({"--output": args.output}, (".png",))
        for flag in ("stages", "microbatches", "bp_steps"):
            if getattr(args, flag) < 1:
                raise ConfigError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
        if args.microbatches < args.stages:
            raise ConfigError(f"--microbatches {args.microbatches}: fewer than the {args.stages} stages; give at least "
                              f"{args.stages}, or fewer --stages")
        if not can_draw():
            raise ConfigError('a picture needs matplotlib, which is not installed; pip install -e ".[plan]"')
        draw(args.stages, args.microbatches, args.bp_steps, args.output)
        print(args.output)
    return one_line(run)


if __name__ == "__main__":
    sys.exit(main())
