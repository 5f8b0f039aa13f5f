"""Train an HRM: `torchrun -m hrm_megatron.pretrain --hrm-preset B --data-path PREFIX ...`."""
from __future__ import annotations

import argparse
import functools
import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    gc.disable()  # until all is imported: program.collect_garbage

from hrm_megatron.parallel.connections import choose_connections
from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import silence_unactionable

choose_connections(sys.argv[1:])
silence_unactionable()
activate()

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import pretrain  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.global_vars import set_global_variables  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from hrm_megatron.config import PRESETS, ConfigError  # noqa: E402
from hrm_megatron.data.dataset import PackedRows  # noqa: E402
from hrm_megatron.planner.presets import describe_preset  # noqa: E402
from hrm_megatron.program import collect_garbage, write_aside  # noqa: E402
from hrm_megatron.training.agreement import check_agreement  # noqa: E402
from hrm_megatron.training.arguments import no_rows, parse_arguments  # noqa: E402
from hrm_megatron.training.checkpoint import check_checkpoint, check_fit  # noqa: E402
from hrm_megatron.training.console import Console  # noqa: E402
from hrm_megatron.training.data import Sources, count_rows, datasets_provider, open_sources  # noqa: E402
from hrm_megatron.training.data_verification import verify_data  # noqa: E402
from hrm_megatron.training.dry_run import assumed_vocab_size, describe_dry_run, has_data  # noqa: E402
from hrm_megatron.training.early_stopping import check_early_stopping, end_where_stopped  # noqa: E402
from hrm_megatron.training.error_file import OneLineErrors, one_line  # noqa: E402
from hrm_megatron.training.evaluation import Evaluation, settle_evaluation  # noqa: E402
from hrm_megatron.training.going_back import go_back, step_to_go_back_to  # noqa: E402
from hrm_megatron.training.layout import describe  # noqa: E402
from hrm_megatron.training.loop import install_all  # noqa: E402
from hrm_megatron.training.match_flops import match_flops  # noqa: E402
from hrm_megatron.training.own_flags import given_by_hand  # noqa: E402
from hrm_megatron.training.restarts import check_launch, check_restarts  # noqa: E402
from hrm_megatron.training.run_files import on_rank_0  # noqa: E402
from hrm_megatron.training.save_lock import SaveLock  # noqa: E402
from hrm_megatron.training.scalars import flush_scalars, guard_curves  # noqa: E402
from hrm_megatron.training.summary import describe_model  # noqa: E402
from hrm_megatron.training.verification import verify_end, verify_start  # noqa: E402

SECONDS_BEHIND_RANK_0 = 5.0  # if all ranks raise the same error, the launcher kills the others and repeats rank 0's

log = logging.getLogger("hrm_megatron.pretrain")  # __name__ is __main__


class OpenedData:
    """The data of a run, opened while the command line is completed, because the data state the vocabulary size."""

    def __init__(self) -> None:
        self.sources: Sources | None = None

    def vocab_size(self, args: argparse.Namespace) -> int:
        """Open the data and return their vocabulary size; a dry run without data assumes one."""
        if args.dry_run and not has_data(args):
            return assumed_vocab_size(args)
        self.sources = open_sources(args)
        return self.sources.vocab_size

    def rows_of_epoch(self, args: argparse.Namespace) -> int:
        """Count the rows of the first epoch."""
        return count_rows(args, self.sources) if self.sources else no_rows(args)


def train(console: Console, saves: SaveLock) -> None:
    """Run Megatron's training loop with our model, data and optimizer."""
    check_restarts()
    opened = OpenedData()
    args = parse_arguments(opened.vocab_size, opened.rows_of_epoch)
    if args.print_config:
        return console.answer([describe_preset(args.hrm_preset, PRESETS[args.hrm_preset], given_by_hand(args))],
                              args.verbose)
    matched = match_flops(args, opened.sources)
    evaluation, install_eval_tasks = refuse(args, opened.sources)
    if args.dry_run:
        return console.answer([*matched, *describe_dry_run(args, opened.sources, evaluation)], args.verbose)
    check_launch()
    console.settle(args.save or args.tensorboard_dir, args.verbose)
    data = opened.sources
    assert data is not None  # only a dry run may have none
    saves.hold(args)
    back_to = step_to_go_back_to(args)
    start, is_left = check_checkpoint(args, evaluation)
    fits = functools.partial(check_fit, args, evaluation)
    if start and not is_left and not verify_end(args, start, fits, back_to):
        return write_report(args)
    set_global_variables(args, build_tokenizer=False)  # rows are token ids; a tokenizer would import transformers, 2 s
    guard_curves(args)
    for line in (*matched, describe_model(args), describe(args)):
        log.info(line)
    loop = install_all(args, console, data, evaluation, install_eval_tasks, start)
    watchdog, step = loop.watchdog, loop.step

    def build_model(vp_stage: int | None = None, **options: Any) -> Any:
        if not vp_stage:  # the first call, and the first point at which process groups exist
            if watchdog:
                watchdog.begin()
            check_agreement(data.files, start)
            if args.verify_data:
                verify_data(data.stores)
            verify_start(args, start, fits, back_to)
        return step.build_model(vp_stage=vp_stage, **options)

    def ready(train_rows: PackedRows | None) -> None:
        saves.hold(args, make=True)
        on_rank_0(functools.partial(go_back, args, back_to))
        loop.reporter.begin(train_rows)
        end_where_stopped(args)
        step.meter.restart()

    asked = args.train_iters
    try:
        pretrain(pretrain_cfg_container_from_args(args),
                 datasets_provider(args, data, evaluation, ready, loop.sources_by_name), ModelType.encoder_or_decoder,
                 step.forward, build_model)
        evaluation.note_end(args)
    except SystemExit as early:  # Megatron exits so after the save for a signal or an exit interval
        if early.code:
            raise
    args.train_iters = asked  # early stopping lowers it to end the loop
    flush_scalars()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        if watchdog:
            watchdog.end()
        torch.distributed.destroy_process_group()
    write_report(args)


def refuse(args: argparse.Namespace, data: Sources | None) -> tuple[Evaluation, Callable[[], None]]:
    """Refuse arguments that do not fit the data, in a dry run as in a run, without writing or locking anything.

    Returns what is evaluated, and the function that installs `--eval-tasks`. Without data, every split is assumed to
    exist. Checkpoint folders are checked later, by `check_checkpoint`, once they are locked.
    """
    evaluation = settle_evaluation(args, *(data.held_out() if data else (1, 1)),
                                   data.why_no_validation(args.split) if data else "")
    check_early_stopping(args, evaluation)
    return evaluation, eval_tasks_of(args, evaluation)


def write_report(args: argparse.Namespace) -> None:
    """Write the report of a finished run if `--run-report` asks for it; a failure is only a warning."""
    if not args.run_report or args.rank:
        return
    from hrm_megatron.monitoring.report import report  # late: imports matplotlib, which few runs need
    from hrm_megatron.monitoring.run_folder import RunFolder
    from hrm_megatron.monitoring.scalars import read_log

    arguments = {name: str(value) for name, value in sorted(vars(args).items())}
    found = RunFolder(Path(args.save or args.tensorboard_dir), Path(args.tensorboard_dir),
                      Path(args.save) if args.save else None, arguments)
    try:
        write_aside(Path(args.run_report), report(found, read_log(found), {}))
        log.info(f"report: {args.run_report}")
    except (OSError, ConfigError) as error:
        log.warning(f"--run-report {args.run_report}: not written ({error})")


def eval_tasks_of(args: argparse.Namespace, evaluation: Evaluation) -> Callable[[], None]:
    """Open the tasks that `--eval-tasks` names; return the function that installs their evaluation."""
    if all(value is None for name, value in vars(args).items() if name.startswith("eval_tasks")):
        return lambda: None
    from hrm_megatron.evaluate.live_tasks import install_tasks, open_tasks  # late: the import takes half a second

    tasks = open_tasks(args, evaluation.validates)
    return lambda: install_tasks(args, tasks, evaluation)


def run(rank: int, ranks: int) -> None:
    try:
        with Console(rank, ranks) as console, SaveLock() as saves:
            train(console, saves)
    except ConfigError:
        if rank:
            time.sleep(SECONDS_BEHIND_RANK_0)
        raise


def main() -> None:
    collect_garbage()
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    try:
        record(run, OneLineErrors(rank))(rank, ranks)
    except Exception as error:
        line = one_line(error, rank)
        if line is None:
            raise
        print(line, file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
