"""Decisions for launch_scripts/train_slurm.sh between launches: `python -m hrm_megatron.cluster begin|judge|end ...`.

Prints one line on stdout: the action (go, requeue, done, stop) and the nodes to exclude, comma-separated. The reason
goes to stderr.
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
from hrm_megatron.cluster.node_check import (
    Limits,
    find_bad_nodes,
    nothing_known,
    read_reports,
    trouble_of_all,
)
from hrm_megatron.cluster.record import describe_start
from hrm_megatron.config import ConfigError
from hrm_megatron.program import one_line, write_aside

SUMMARY_LINES = 40  # of an error summary shown in the job's log; the file has all


def begin(arguments: argparse.Namespace, history: History) -> Verdict:
    """Record a start and decide whether to launch: not if another job trains this run, too many starts have failed, or
    an excluded node was allocated."""
    logs = _logs(arguments)
    if not logs.is_dir():  # created by the batch script
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
    """Find the bad nodes of this start from their reports, and exclude them from now on."""
    attempt, reports = history.up_to(arguments.job, arguments.restart)[-1], read_reports(arguments.reports)
    not_ended = Verdict(GO, f"the check has not ended on any node ({arguments.reports}), so it blames none")
    if not reports:  # do not blame all nodes at once: excluding them would only empty the cluster
        return not_ended
    limits = Limits(**{
        name: value for name, value in vars(arguments).items() if name in Limits.__dataclass_fields__})
    if why := trouble_of_all(reports, attempt.nodes, limits):
        return decide(history.end(attempt.job, attempt.restart, REFUSED, saved_step(arguments.checkpoints), why),
                      arguments.max_failures)
    if why := nothing_known(reports):
        print(f"slurm: {why}", file=sys.stderr)
    bad = find_bad_nodes(reports, attempt.nodes, limits)
    if not bad and all(report.error for report in reports):
        return not_ended
    if bad:
        history.exclude(bad)
    return _avoid(arguments, history, bad)


def end(arguments: argparse.Namespace, history: History) -> Verdict:
    """Record how a launch ended, and write one summary of its errors."""
    attempt = history.up_to(arguments.job, arguments.restart)[-1]  # raises if it was never begun
    step, logs = saved_step(arguments.checkpoints), _logs(arguments)
    failures = read_failures(logs)
    outcome, why = first_cause(failures, arguments.code)
    # A launch signalled at the time limit may not have run, so it may have left a missing evaluation undone; one that
    # rolled back began at another step.
    began = None if arguments.signalled or history.went_back_in(attempt) else attempt.first_step
    how = how_it_ended(arguments.code, outcome, is_done(arguments.checkpoints, began, step, arguments.train_iters),
                       arguments.signalled)
    if arguments.cancelled:
        how = CANCELLED
    elif arguments.code:
        summary = summarize(failures, arguments.code, logs)
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
    """Return the folder of a start, inside the run's."""
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
            command.add_argument("--nodes", nargs="+", action="extend", required=True)
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
