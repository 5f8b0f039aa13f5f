"""Plan the training of a model on a cluster: parallel layout, micro-batch size, recompute; memory, time and command.

    python tools/plan.py --hrm-preset XXXL --gpus 64 --gpu h100-80gb
    python tools/plan.py --sizes 48 4096 32 --gpus 512 --explain --json plan.json --png plan.png

Memory is a sum over tensor shapes; times are predictions. --calibrate takes speeds that tools/benchmark.py measured.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hrm_megatron.program import check_outputs, listen, one_line, write_aside

if __name__ == "__main__":
    listen()

from hrm_megatron.config import PRESET_VOCAB_SIZE, PRESETS, Architecture, ConfigError, ffn_hidden_size
from hrm_megatron.model.ticks import ticks_of
from hrm_megatron.planner import calibration, goodput, report
from hrm_megatron.planner.goodput import GPU_MTTF_HOURS
from hrm_megatron.planner.machines import DEVICE_NAMES, GPUS, Cluster
from hrm_megatron.planner.memory import BF16
from hrm_megatron.planner.search import Question, search
from hrm_megatron.planner.speed import EXAMPLE

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., arXiv 2203.15556
MOST = 1e18  # largest number accepted; the smallest is 1 / MOST
PRECISIONS = {"bf16": ("bf16",), "fp8": ("fp8",), "auto": ("bf16", "fp8")}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--hrm-preset", choices=[*PRESETS])
    model.add_argument("--sizes", type=int, nargs=3, metavar=("LAYERS", "HIDDEN", "HEADS"), help="LAYERS of each stack")
    parser.add_argument("--vocab-size", type=int, default=PRESET_VOCAB_SIZE)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpu", choices=[*GPUS], default="h100-80gb")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--memory-gb", type=float, help="of a GPU, where it is not the maker's")
    parser.add_argument("--nvlink-gb", type=float, help="GB/s of NVLink, one way, per GPU")
    parser.add_argument("--network-gb", type=float, help="GB/s between nodes, one way, per GPU")
    parser.add_argument("--tokens", type=float, help=f"of the run (default: {TOKENS_PER_PARAMETER} a parameter)")
    parser.add_argument("--tokens-per-step", type=int, help="default: the preset's")
    parser.add_argument("--seq-length", type=int, default=4096, help="positions of a row")
    parser.add_argument("--example", type=int, nargs=2, metavar=("PREFIX", "RESPONSE"),
                        help=f"tokens of a usual example (default: {' '.join(map(str, EXAMPLE))}, and in shorter rows "
                             "one that fills a row, of the same proportions)")
    parser.add_argument("--bp-min-steps", type=int, default=2)
    parser.add_argument("--bp-max-steps", type=int, default=5)
    parser.add_argument("--bp-warmup-fraction", type=float, default=0.2)
    parser.add_argument("--precision", choices=[*PRECISIONS], default="bf16")
    parser.add_argument("--price", type=float, help="of a GPU for an hour: adds the cost of the run")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="take the speeds measured on such a GPU")
    parser.add_argument("--gpu-mttf-hours", type=float, default=GPU_MTTF_HOURS,
                        help="hours of a GPU between failures (default: a failure every 8 hours on 1,024 GPUs)")
    for name, of in (("save", "a save takes"), ("stall", "training waits for a save that is written behind it"),
                     ("load", "a load takes"), ("start", "a start takes, without the load"),
                     ("detect", "pass until a failure is noticed")):
        parser.add_argument(f"--{name}-seconds", type=float, metavar="S", help=f"measured: how long {of}")
    parser.add_argument("--explain", action="store_true", help="take the best plan apart")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE", help="memory, and the schedule (needs matplotlib)")
    return parser


def question(args: argparse.Namespace) -> Question:
    """Return the planner's question from the arguments; raises ConfigError for values that are out of range."""
    for name in ("gpus", "gpus_per_node", "seq_length", "tokens", "tokens_per_step", "vocab_size"):
        if (value := getattr(args, name)) is not None and not 1 <= value <= MOST:  # NaN too
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1, and at most {MOST:g}")
    example = args.example or usual_example(args.seq_length)
    if example[0] < 0 or example[1] < 1 or sum(example) > args.seq_length:
        raise ConfigError(f"--example {' '.join(map(str, example))}: a prefix has at least 0 tokens, a response 1, and "
                          f"both together the {args.seq_length} of a row (--seq-length) at most")
    for name in ("memory_gb", "nvlink_gb", "network_gb", "price", "gpu_mttf_hours",
                 *(f"{part}_seconds" for part in goodput.Measured.__annotations__)):
        if (value := getattr(args, name)) is not None and not 1 / MOST <= value <= MOST:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be above 0, from {1 / MOST:g} to {MOST:g}")
    if args.hrm_preset:
        preset = PRESETS[args.hrm_preset]
        architecture, step = preset.architecture(args.vocab_size), args.tokens_per_step or preset.tokens_per_step
    else:
        layers, hidden, heads = args.sizes
        architecture = Architecture(layers, hidden, heads, ffn_hidden_size(hidden), args.vocab_size)
        step = args.tokens_per_step
    for flag, bp_steps in (("--bp-max-steps", args.bp_max_steps), ("--bp-min-steps", args.bp_min_steps)):
        try:
            ticks_of(architecture, bp_steps)
        except ConfigError as error:
            raise ConfigError(f"{flag} {bp_steps}: {error}") from error
    if args.precision == "fp8" and not GPUS[args.gpu].fp8:
        raise ConfigError(f"--precision fp8: {args.gpu} has no FP8; leave it out, or plan for another --gpu")
    if not step:
        raise ConfigError("--tokens-per-step is not set: give it, or a --hrm-preset, which has one")
    if step % args.seq_length:
        raise ConfigError(f"--seq-length {args.seq_length}: does not divide the {step} tokens of a step; change it or "
                          "--tokens-per-step")
    speeds = None
    if args.calibrate:
        measured = calibration.read(args.calibrate)
        if measured.on_cpu:
            raise ConfigError(f"--calibrate {args.calibrate}: was measured on a CPU ({measured.device}); measure on a "
                              f"{args.gpu}")
        if (known := DEVICE_NAMES.get(measured.device)) not in (None, args.gpu):
            raise ConfigError(f"--calibrate {args.calibrate}: was measured on a {known}, and --gpu is {args.gpu}; "
                              "measure on one of those, or plan for the other")
        if measured.itemsize != BF16:
            raise ConfigError(f"--calibrate {args.calibrate}: was measured in fp32, and plans are for bf16; measure "
                              "in that")
        speeds = measured.speeds
    cluster = Cluster.of(args.gpu, args.gpus, args.gpus_per_node, args.memory_gb, args.nvlink_gb, args.network_gb,
                         speeds)
    return Question(architecture, cluster, args.tokens or TOKENS_PER_PARAMETER * architecture.num_parameters,
                    step // args.seq_length, args.seq_length,
                    (args.bp_min_steps, args.bp_max_steps, args.bp_warmup_fraction), PRECISIONS[args.precision],
                    tuple(example))


def usual_example(row_tokens: int) -> tuple[int, int]:
    """Return prefix and response of EXAMPLE, scaled down if rows are shorter."""
    whole = min(row_tokens, sum(EXAMPLE))
    prefix = EXAMPLE[0] * whole // sum(EXAMPLE)
    return prefix, whole - prefix


def plan(args: argparse.Namespace) -> None:
    """Search, and print the result."""
    check_outputs({"--json": args.json, "--png": args.png})
    asked = question(args)
    name = args.hrm_preset or f"{asked.architecture.num_layers} layers of {asked.architecture.hidden_size}"
    plans, rejected = search(asked)
    print(*report.head(name, asked), "", sep="\n")
    if not plans:
        print(*report.reasons(rejected), sep="\n")
        raise ConfigError(f"--gpus {args.gpus}: {name} fits no layout; " + (
            "give more GPUs or ones with more memory, or change --tokens-per-step"
            if any(one.too_large for one in rejected) else "none lacks memory: change what the reasons above name"))
    print(*report.table(asked, plans, args.price), "", report.command(plans[0], asked, args.hrm_preset), "", sep="\n")
    measured = goodput.Measured(**{name: getattr(args, f"{name}_seconds") for name in goodput.Measured.__annotations__})
    hazards = goodput.hazards_of(plans[0], asked, args.gpu_mttf_hours, measured)
    saves = goodput.compare_saves(plans[0], asked, hazards)
    print(*goodput.describe(plans[0], hazards, measured, saves), "", sep="\n")
    if args.explain:
        print(*report.explain(asked, plans[0]), "", sep="\n")
    print(*report.reasons(rejected, None if args.explain else report.KINDS), sep="\n")
    if args.json:
        data = report.as_data(name, asked, plans, rejected, args.hrm_preset)
        data["goodput"] = dict(vars(hazards), saves=saves)
        write_aside(args.json, json.dumps(data, indent=1) + "\n")
    if args.png:
        try:
            from hrm_megatron.planner.picture import draw
        except ModuleNotFoundError as error:
            raise ConfigError(f"--png {args.png}: needs {error.name}, which is not installed; pip install -e "
                              '".[plan]"') from error
        draw(asked, plans[:report.SHOWN], f"{name} on {args.gpus} x {args.gpu}: predictions", args.png)


def main() -> int:
    args = parser().parse_args()
    return one_line(lambda: plan(args))


if __name__ == "__main__":
    sys.exit(main())
