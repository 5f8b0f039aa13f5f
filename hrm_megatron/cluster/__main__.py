"""What launch_scripts/train_slurm.sh asks between two launches: `python -m hrm_megatron.cluster begin|judge|end ...`.

Answers on stdout in one line: what to do (go, requeue, done, stop), and the nodes to avoid, with commas. Why is on
stderr.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hrm_megatron.cluster.attempts import (
    BAD_NODE,
    CANCELLED,
    EXCLUDED_FILE,
    GO,
    RUNNING,
    STOP,
    Attempt,
    History,
    Verdict,
    decide,
    how_it_ended,
    is_done,
    saved_step,
)
from hrm_megatron.cluster.failures import FAILED, REFUSED, SUMMARY_FILE, first_cause, read_failures, summarize
from hrm_megatron.cluster.node_check import Limits, find_bad_nodes, read_reports, trouble_of_all
from hrm_megatron.cluster.record import describe_start
from hrm_megatron.config import ConfigError
from hrm_megatron.program import one_line, write_aside

SUMMARY_LINES = 40  # of an error summary in the job's log; the file has all


def begin(arguments: argparse.Namespace, history: History) -> Verdict:
    """Write down a start, unless the run is over or has been given a node that it avoids."""
    logs = _logs(arguments)
    if not logs.is_dir():  # the batch script has made it
        raise ConfigError(f"--save {arguments.checkpoints}: not mounted in the container; add it to MOUNTS")
    unended = {one.job for one in history.attempts if one.end == RUNNING} - {arguments.job}
    if rivals := unended & {*arguments.running.split()}:
        return Verdict(STOP, f"job {min(rivals)} trains this run; scancel it, or wait until it has ended")
    step = saved_step(arguments.checkpoints)
    lost = history.begin(Attempt(arguments.job, arguments.restart, tuple(arguments.nodes), step, step))
    write_aside(logs / "manifest.json", json.dumps(describe_start(arguments.command, arguments.nodes), indent=1) + "\n")
    if lost:
        verdict = decide(lost, arguments.max_failures)
        if verdict.action == STOP:
            history.end(arguments.job, arguments.restart, FAILED, step, verdict.why)
            return verdict
    return _avoid(arguments, history, {node: why for node, why in history.excluded.items() if node in arguments.nodes})


def judge(arguments: argparse.Namespace, history: History) -> Verdict:
    """Name the bad nodes of this start by their reports, and remember them."""
    attempt, reports = history.up_to(arguments.job, arguments.restart)[-1], read_reports(arguments.reports)
    not_ended = Verdict(GO, f"the check has not ended on any node ({arguments.reports}), so it blames none")
    if not reports:  # not all nodes at once: to avoid them would only empty the cluster
        return not_ended
    if why := trouble_of_all(reports, attempt.nodes):
        return decide(history.end(attempt.job, attempt.restart, REFUSED, saved_step(arguments.checkpoints), why),
                      arguments.max_failures)
    bad = find_bad_nodes(reports, attempt.nodes, Limits(**{
        name: value for name, value in vars(arguments).items() if name in Limits.__dataclass_fields__}))
    if not bad and all(report.error for report in reports):
        return not_ended
    if bad:
        history.exclude(bad)
    return _avoid(arguments, history, bad)


def end(arguments: argparse.Namespace, history: History) -> Verdict:
    """Write down how a launch ended, with one summary of its errors."""
    attempt = history.up_to(arguments.job, arguments.restart)[-1]  # else nobody has begun it
    step, logs = saved_step(arguments.checkpoints), _logs(arguments)
    failures = read_failures(logs)
    outcome, why = first_cause(failures, arguments.code)
    # One that was told of the limit may never have launched, and then it has made up no evaluation; one that went back
    # began elsewhere.
    began = None if arguments.signalled or history.went_back_in(attempt) else attempt.first_step
    how = how_it_ended(arguments.code, outcome, is_done(arguments.checkpoints, began, step, arguments.train_iters),
                       arguments.signalled)
    if arguments.cancelled:
        how = CANCELLED
    elif arguments.code:
        summary = summarize(failures, arguments.code)
        write_aside(logs / SUMMARY_FILE, summary)
        shown = summary.splitlines()
        print(*shown[:SUMMARY_LINES], f"all of it, and the log of each rank: {logs}", sep="\n", file=sys.stderr)
    return decide(history.end(arguments.job, arguments.restart, how, step,
                              why if arguments.code and not arguments.cancelled else ""), arguments.max_failures)


def _avoid(arguments: argparse.Namespace, history: History, bad: dict[str, str]) -> Verdict:
    step = saved_step(arguments.checkpoints)
    if not bad:
        return Verdict(GO, f"attempt {arguments.restart} of job {arguments.job} goes on after step {step}")
    why = "; ".join(f"{node}: {why}" for node, why in bad.items())
    verdict = decide(history.end(arguments.job, arguments.restart, BAD_NODE, step, why), arguments.max_failures)
    return Verdict(verdict.action, f"{why} (avoided from now on: {history.folder / EXCLUDED_FILE}); {verdict.why}")


def _logs(arguments: argparse.Namespace) -> Path:
    """The folder of a start, below the run's."""
    folder: Path = arguments.folder
    return folder / f"{arguments.job}.{arguments.restart}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hrm_megatron.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for ask in (begin, judge, end):
        command = commands.add_parser(ask.__name__, description=ask.__doc__)
        command.set_defaults(ask=ask)
        command.add_argument("--folder", type=Path, required=True, help="where the run's starts are written down")
        command.add_argument("--checkpoints", type=Path, required=True, help="the run's --save")
        command.add_argument("--max-failures", type=int, default=5,
                             help="failed starts without a new save after which a job stops")
        command.add_argument("--job", required=True)
        command.add_argument("--restart", type=int, default=0, help="how often Slurm has queued the job again")
        if ask is begin:
            command.add_argument("--running", default="", help="jobs of the run that Slurm has on nodes, with blanks")
            command.add_argument("--nodes", nargs="+", required=True)
            command.add_argument("command", nargs="*", help="the run's command, after --")
        elif ask is judge:
            command.add_argument("--reports", type=Path, required=True, help="folder of the nodes' reports")
            Limits.add_arguments(command)
        else:
            command.add_argument("--code", type=int, required=True)
            command.add_argument("--train-iters", type=int, required=True)
            command.add_argument("--signalled", action="store_true", help="the launch was told of the time limit")
            command.add_argument("--cancelled", action="store_true", help="for Slurm the job is not running any more")
    return parser


def main() -> None:
    arguments = parser().parse_args()

    def answer() -> None:
        history = History(arguments.folder, arguments.checkpoints)
        verdict = arguments.ask(arguments, history)
        print(f"slurm: {verdict.why}", file=sys.stderr)
        print(verdict.action, ",".join(history.excluded))

    sys.exit(one_line(answer))


if __name__ == "__main__":
    main()
