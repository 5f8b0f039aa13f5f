"""Evaluate a checkpoint (Megatron, transformers or HRM-Text) on the tasks of the reference.

    python tools/evaluate.py --load runs/xl/hf --output runs/xl/evaluation
    python tools/evaluate.py --load runs/xl/hf --tasks gsm8k math --samples 8 --temperature 0.6 --output runs/xl/maj8
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

from hrm_megatron.config import ConfigError  # noqa: E402
from hrm_megatron.evaluate.ask import TaskAnswers, prepare  # noqa: E402
from hrm_megatron.evaluate.report import earlier_results, percent, write_reports  # noqa: E402
from hrm_megatron.evaluate.rows import read_first_items  # noqa: E402
from hrm_megatron.evaluate.scoring import equal_math  # noqa: E402
from hrm_megatron.evaluate.summary import Result, summarize  # noqa: E402
from hrm_megatron.evaluate.tasks import TASKS, Task, chosen, with_shots  # noqa: E402
from hrm_megatron.generate.answer_count import answer_count  # noqa: E402
from hrm_megatron.generate.flags import add_compute_flags, add_model_flags  # noqa: E402
from hrm_megatron.generate.sampling import Sampling  # noqa: E402
from hrm_megatron.generate.session import Answering, Session  # noqa: E402


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(p, "evaluate")
    p.add_argument("--output", type=Path, required=True, metavar="DIR",
                   help="answers and results; the same command goes on where it was interrupted")
    p.add_argument("--tasks", nargs="+", action="extend", metavar="TASK", help=f"of {', '.join(TASKS)} (all)")
    p.add_argument("--data", type=Path, metavar="DIR",
                   help="rows as DIR/TASK/SPLIT.jsonl or .parquet (default: from the hub, by datasets)")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    p.add_argument("--condition", action="append", default=[], metavar="TASK=TAGS",
                   help="other tags than the reference's, such as mmlu_pro=synth,cot")
    p.add_argument("--shots", action="append", default=[], metavar="TASK=N", help="another number of shots")
    how = p.add_argument_group("how to answer")
    how.add_argument("--max-new-tokens", type=int, metavar="N",
                     help="at most so many per free answer (default: what the context leaves room for)")
    how.add_argument("--samples", type=int, default=1, help="answers to each question, of which the majority decides")
    how.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    how.add_argument("--top-p", type=float, default=1.0)
    how.add_argument("--seed", type=int, default=1234)
    add_compute_flags(how)
    how.add_argument("--batch-size", type=int, default=32, help="answers at once (default: %(default)s)")
    return p


def say(line: str) -> None:
    print(line, file=sys.stderr)


def pairs(flag: str, given: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise ConfigError(f"{flag} {each}: write TASK=VALUE")
        if name in found:
            raise ConfigError(f"{flag} {each}: {flag} {name}={found[name]} is given too; leave one of them out")
        found[name] = value
    return found


def tasks_of(args: argparse.Namespace) -> list[Task]:
    shots = pairs("--shots", args.shots)
    found = chosen(args.tasks or list(TASKS), pairs("--condition", args.condition))
    by_name = {task.name: task for task in found}
    for name, number in shots.items():
        if name not in by_name:
            raise ConfigError(f"--shots {name}={number}: that task is not among --tasks; leave one of them out")
        if not number.isdecimal():
            raise ConfigError(f"--shots {name}={number}: not a number of shots")
    found = [with_shots(task, int(shots[task.name])) if task.name in shots else task for task in found]
    if args.max_new_tokens is not None:
        if all(task.new_tokens for task in found):
            raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: no task of {', '.join(by_name)} has free "
                              "answers; leave it out")
        found = [replace(task, new_tokens=task.new_tokens or args.max_new_tokens) for task in found]
    return found


def evaluate(args: argparse.Namespace) -> None:
    for name in ("limit", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    tasks = tasks_of(args)
    if args.samples > 1 and not args.temperature:
        raise ConfigError(f"--samples {args.samples}: greedy answers are all the same; give a --temperature")
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    if any(task.name == "math" for task in tasks):
        equal_math("1", "1")  # fail now, not after hours of work
    rows = {task.name: read_first_items(task, args.data, args.limit) for task in tasks}
    session = Session(args.load, Answering(
        sampling=sampling if args.temperature else Sampling(),  # greedy answers do not depend on a seed
        samples=args.samples, h_cycles=args.h_cycles, l_cycles=args.l_cycles, exit_threshold=args.exit_threshold,
        dtype=args.dtype), args.tokenizer_model, args.weights, args.ckpt_step, args.verify_checkpoint)
    if session.remark:
        say(session.remark)
    prepared = []
    for task in tasks:  # check all tasks before answering the first
        context = min(task.context_tokens, session.decoder.context_tokens)
        questions, shots, _ = rows[task.name]
        asked = prepare(task, questions, shots, session.tokenizer, context)
        prepared.append(TaskAnswers(args.output, task, session, asked, context))
    earlier_results(args.output, session.identity, tasks)  # fail now, not after hours of work
    results = [replace(measured(each, args), limit=args.limit if rows[each.task.name][2] else None)
               for each in prepared]
    kept = earlier_results(args.output, session.identity, tasks)  # may include those of a call that has ended meanwhile
    if kept:
        say(f"{args.output}: the reports keep {', '.join(each.task.title for each in kept)} of an earlier call")
    results = sorted([*kept, *results], key=lambda each: list(TASKS).index(each.task.name))
    for line in write_reports(results, session.identity, args.output):
        say(line)


def measured(answers: TaskAnswers, args: argparse.Namespace) -> Result:
    task = answers.task
    with answer_count(len(answers.asked) * args.samples, task.title) as show:
        records = answers.records(args.batch_size, say, show)
    result = summarize(task, answers.asked, records, args.samples, answers.context_tokens)
    print(f"{task.title}: " + ", ".join(f"{name} {percent(found)}" for name, found in result.metrics.items())
          + f" ({result.questions} questions, {result.invalid} invalid, {result.too_long} too long)", flush=True)
    return result


def main() -> int:
    args = parser().parse_args()
    return one_line(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
