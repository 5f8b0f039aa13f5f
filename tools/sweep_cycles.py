"""Measure a checkpoint's accuracy and time at other numbers of cycles and with early exit.

    python tools/sweep_cycles.py --load runs/demo/hf --input runs/demo/questions/test.jsonl --h-cycles 1 2 3 4 \
        --exit-threshold 0.3 0.1 --png cycles.png

Prints a table whose first line is the depth of training. With early exit the largest of --h-cycles is the limit.
"""
from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

from hrm_megatron.program import check_outputs, listen, one_line, write_aside

if __name__ == "__main__":
    listen()

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

import torch  # noqa: E402

from hrm_megatron.config import ConfigError  # noqa: E402
from hrm_megatron.data.write_report import can_draw  # noqa: E402
from hrm_megatron.evaluate.rows import read_items  # noqa: E402
from hrm_megatron.evaluate.scoring import equal_math  # noqa: E402
from hrm_megatron.evaluate.sweep import (  # noqa: E402
    Depth,
    Questions,
    as_json,
    exact_questions,
    sweep,
    table,
    task_questions,
)
from hrm_megatron.evaluate.tasks import TASKS, chosen  # noqa: E402
from hrm_megatron.generate.flags import add_model_flags  # noqa: E402
from hrm_megatron.generate.session import Answering, Session  # noqa: E402
from hrm_megatron.parallel.precision import DTYPES  # noqa: E402


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(p, "measure")
    asked = p.add_mutually_exclusive_group(required=True)
    asked.add_argument("--input", type=Path, metavar="JSONL",
                       help="instruction, response and condition (else --condition); right is the response alone")
    asked.add_argument("--task", choices=[*TASKS], help="a task of tools/evaluate.py, by its first metric")
    p.add_argument("--condition", help="tags of rows without some (default: direct), or other tags of --task")
    p.add_argument("--data", type=Path, metavar="DIR", help="rows of --task as DIR/TASK/SPLIT.jsonl or .parquet "
                                                            "(default: from the hub, by datasets)")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N questions of --task")
    depths = p.add_argument_group("depths")
    for flag in ("--h-cycles", "--l-cycles"):
        depths.add_argument(flag, type=int, nargs="+", action="extend", metavar="N", help="(default: as in training)")
    depths.add_argument("--exit-threshold", type=float, nargs="+", action="extend", default=[], metavar="X",
                        help="also end an answer's H cycles with the first that changes z_H of its prompt by less than "
                             "X times its norm")
    how = p.add_argument_group("how to measure")
    how.add_argument("--dtype", choices=[*DTYPES], default="float32", help="of weights and cache")
    how.add_argument("--batch-size", type=int, default=32, help="answers at once (default: %(default)s)")
    how.add_argument("--repeats", type=int, default=3, help="measurements of time, of which the least counts (default: "
                                                            "%(default)s)")
    how.add_argument("--cpu-time", action="store_true", help="count the time of the process, where others use the "
                                                             "machine too")
    p.add_argument("--json", type=Path, help="where all numbers go")
    p.add_argument("--png", type=Path, help="where the picture goes; needs matplotlib")
    return p


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check_flags(args: argparse.Namespace) -> None:
    for name in ("limit", "repeats", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.input:
        if not args.input.exists() or args.input.is_dir():
            raise ConfigError(f"--input {args.input}: is no file; give a jsonl file of questions")
        for name in ("data", "limit"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name}: is about a --task, and --input is given; leave one of them out")
    if args.png and not can_draw():
        raise ConfigError("--png: needs matplotlib, which is not installed: pip install matplotlib, or leave it out")
    if args.cpu_time and torch.cuda.is_available():
        raise ConfigError("--cpu-time: does not count the time of the GPU, which answers; leave it out")
    check_outputs({"--json": args.json, "--png": args.png}, inputs={"--input": args.input})


def depths_of(args: argparse.Namespace, h_trained: int, l_trained: int) -> list[Depth]:
    """Return the depths without duplicates, that of training first."""
    outer, inner = args.h_cycles or [h_trained], args.l_cycles or [l_trained]
    found = [Depth(h_trained, l_trained), *itertools.starmap(Depth, itertools.product(outer, inner))]
    found += [Depth(max(outer), l_cycles, threshold) for l_cycles in inner for threshold in args.exit_threshold]
    return list(dict.fromkeys(found))


def questions_of(args: argparse.Namespace, session: Session) -> Questions:
    if args.input:
        return exact_questions(args.input, "direct" if args.condition is None else args.condition, session)
    [task] = chosen([args.task], {} if args.condition is None else {args.task: args.condition})
    if task.name == "math":
        equal_math("1", "1")  # fail now, not after hours of work
    return task_questions(task, read_items(task, args.data, args.limit), session)


def measure(args: argparse.Namespace) -> None:
    check_flags(args)
    session = Session(args.load, Answering(dtype=args.dtype), args.tokenizer_model, args.weights, args.ckpt_step,
                      args.verify_checkpoint)
    if session.remark:
        say(session.remark)
    trained = session.decoder.architecture
    depths = depths_of(args, trained.h_cycles, trained.l_cycles)
    if len(depths) == 1:
        raise ConfigError("nothing to compare: the only depth is that of training; give others as --h-cycles, "
                          "--l-cycles or --exit-threshold")
    sessions = {depth: session.at_depth(depth.h_cycles, depth.l_cycles, depth.exit_threshold) for depth in depths}
    questions = questions_of(args, session)
    asked = sum(request is not None for request in questions.requests)
    name = args.task or args.input.name
    if not asked:
        raise ConfigError(f"{name}: none of its {len(questions.requests)} questions fits into the model's context of "
                          f"{session.decoder.context_tokens} positions")
    clock = time.process_time if args.cpu_time else time.perf_counter
    points = sweep(sessions, questions, args.batch_size, args.repeats, clock, say)
    print(f"{name}: {len(questions.requests)} questions, {len(questions.requests) - asked} too long; {args.dtype}, "
          f"{args.batch_size} at once, {torch.get_num_threads()} thread(s), "
          f"{'CPU time of the process' if args.cpu_time else 'wall time'}, least of {args.repeats}\n")
    print(table(points, asked))
    if args.json:
        write_aside(args.json, json.dumps(as_json(points, session.identity, asked), indent=1) + "\n")
        say(f"written: {args.json}")
    if args.png:
        from hrm_megatron.evaluate.picture import draw_sweep
        write_aside(args.png, draw_sweep(points, asked, name))
        say(f"written: {args.png}")


def main() -> int:
    args = parser().parse_args()
    return one_line(lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
