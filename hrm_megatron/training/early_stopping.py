"""`--early-stopping N`: end a run whose validation exact accuracy no longer rises, and keep its best iteration.

Measurements are kept in early_stopping.json in --save, so that a resumed run decides like an uninterrupted one.
"""
from __future__ import annotations

import argparse
import functools
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.training import training as megatron_training

from hrm_megatron.checkpoint.iterations import folder_name
from hrm_megatron.checkpoint.retention import delete, expendable
from hrm_megatron.config import ConfigError, refuse_beside
from hrm_megatron.parallel.patching import around
from hrm_megatron.training.evaluation import EMA, ON_TEST_SET, RAW, Evaluation
from hrm_megatron.training.resume import digest_of_data
from hrm_megatron.training.run_files import on_rank_0, read_record, write_file

log = logging.getLogger(__name__)

RECORD_FILE = "early_stopping.json"
MEASURE = "exact accuracy"
ON_VALIDATION_SET = "on validation set"  # in the prefix of the final validation in Megatron's loop


@dataclass
class Record:
    """Exact accuracy by iteration, and the iteration after which the run was stopped, if it was."""

    weights: str  # the measured weights: RAW or EMA
    data: str | None  # digest of the validation examples
    evaluations: dict[int, float] = field(default_factory=dict)
    stopped: int | None = None

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """Return the record of a run, or None if there is none."""
        return read_record(
            path, lambda found: cls(
                found["weights"], found.get("data"),
                {int(iteration): float(value) for iteration, value in found["evaluations"].items()}, found["stopped"]),
            "cannot read what was measured", "remove it to begin to count anew")

    @classmethod
    def read(cls, args: argparse.Namespace, until: int) -> Record:
        """Return the record in --save up to iteration `until`, from which the run resumes; refuse one of other weights
        or data."""
        path = Path(args.save) / RECORD_FILE
        weights = RAW if args.eval_weights == RAW else EMA  # with "both" the EMA, which is evaluated last
        data = digest_of_data(args, "valid")
        if (found := cls.load(path)) is None:
            return cls(weights, data)
        if found.weights != weights and found.evaluations:
            raise ConfigError(f"--eval-weights {args.eval_weights}: early stopping judges by the {weights} weights, "
                              f"but {path} has accuracies of the {found.weights} ones; give --eval-weights "
                              f"{found.weights}, or remove the file to begin to count anew")
        if found.data and data and found.data != data and found.evaluations:
            raise ConfigError(f"{path}: has accuracies on other examples than those to validate on now; give the same "
                              "data, or remove the file to begin to count anew")
        return replace(found.until(until), weights=weights, data=data)

    def until(self, iteration: int) -> Record:
        """Return the record as it was at an iteration."""
        return replace(self, evaluations={i: value for i, value in self.evaluations.items() if i <= iteration},
                       stopped=self.stopped if self.stopped == iteration else None)

    def write(self, save: str) -> None:
        best = self.best
        found = {"measure": f"{MEASURE} of the validation set", "weights": self.weights, "best_iteration": best,
                 "data": self.data, "evaluations": self.evaluations, "stopped": self.stopped}
        write_file(save, RECORD_FILE, json.dumps(found, indent=2) + "\n")

    @property
    def best(self) -> int | None:
        """The first iteration with the highest accuracy, or None."""
        measured = [i for i, value in self.evaluations.items() if not math.isnan(value)]
        return max(measured, key=lambda i: self.evaluations[i], default=None)

    @property
    def evaluations_since_best(self) -> int:
        return sum(i > (self.best or 0) for i in self.evaluations)

    def describe_best(self, save: str) -> str:
        return (f"no {MEASURE} was measured" if self.best is None else
                f"the best is iteration {self.best} with {self.evaluations[self.best]:.1%} exact: "
                f"{save}/{folder_name(self.best)}")


def stopped_early(args: argparse.Namespace, iteration: int) -> str | None:
    """Return one line that says that the run was stopped early at this iteration, or None if it was not."""
    if not args.early_stopping or not args.save:
        return None
    record = Record.read(args, iteration)
    if record.stopped is None or record.evaluations_since_best < args.early_stopping:
        return None
    return f"stopped early at iteration {iteration}, nothing to train; {record.describe_best(args.save)}"


def end_where_stopped(args: argparse.Namespace) -> None:
    """Let a run that resumes where it was stopped early take no step."""
    if stopped_early(args, args.iteration):
        args.train_iters = args.iteration


def delete_older(args: argparse.Namespace, latest: int) -> None:
    """Delete the iterations that --most-recent-k and --save-retain-interval do not keep, after `latest` was saved; call
    it on one rank."""
    if not (args.most_recent_k or args.save_retain_interval):
        return
    save = Path(args.save)
    best = Record.read(args, latest).best if args.early_stopping else None
    try:
        delete(save, expendable(save, latest, args.most_recent_k or 1, args.save_retain_interval,
                                [] if best is None else [best]))
    except OSError as error:
        log.warning(f"checkpoint: cannot delete older iterations in {save} ({error}); they stay")


def check_early_stopping(args: argparse.Namespace, evaluation: Evaluation) -> None:
    """Refuse early stopping without validation or without --save."""
    if not args.early_stopping:
        return
    flag = f"--early-stopping {args.early_stopping}"
    if not args.save:
        raise ConfigError(f"{flag}: has no effect without --save, where the best iteration is kept; give that too")
    if not evaluation.validates:
        raise ConfigError(f"{flag}: there is nothing to validate on; give --valid-data-path PREFIX, or a --split")
    refuse_beside(flag, {"--async-save": args.async_save, "--skip-train": args.skip_train})
    Record.read(args, 0)  # refuse an unusable record now, not at the first evaluation


def install_early_stopping(args: argparse.Namespace) -> None:
    """Install early stopping in Megatron's loop; call it after `guard_saves` and `install_evaluation`."""
    if not args.early_stopping:
        return
    former = Path(args.load or args.save) / RECORD_FILE
    if former.parent != Path(args.save) and former.exists():
        log.info(f"early stopping: counts the evaluations in {args.save} alone; those before are in {former}")
    stopping = EarlyStopping(args)
    megatron_training.evaluate = around(megatron_training.evaluate, stopping.evaluate)
    megatron_training.evaluate_and_print_results = around(megatron_training.evaluate_and_print_results,
                                                           stopping.evaluate_and_print_results)
    megatron_training.save_checkpoint = around(megatron_training.save_checkpoint, stopping.save_checkpoint)
    megatron_training.checkpoint_and_decide_exit = around(megatron_training.checkpoint_and_decide_exit,
                                                           stopping.checkpoint_and_decide_exit)


class EarlyStopping:
    """Wrappers of Megatron's functions; each gets the function that it wraps as first argument."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.measured = math.nan
        self.saved = 0
        self.kept: int | None = None

    @functools.cached_property
    def record(self) -> Record:
        """The record, first read in the loop, when the iteration to resume from is known."""
        record = Record.read(self.args, self.args.iteration)
        self.kept = record.best
        return record

    def evaluate(self, stock: Callable[..., Any], *rest: Any, **options: Any) -> Any:
        found = means, *_ = stock(*rest, **options)
        self.measured = float(means[MEASURE]) if means and MEASURE in means else math.nan
        return found

    def evaluate_and_print_results(self, stock: Callable[..., None], prefix: str, forward_step_func: Any,
                                   data_iterator: Any, model: Any, iteration: int, *rest: Any, **options: Any) -> None:
        if prefix.endswith(ON_VALIDATION_SET) and iteration == self.record.stopped:
            return  # the run was stopped by this validation
        stock(prefix, forward_step_func, data_iterator, model, iteration, *rest, **options)
        if prefix.endswith(ON_TEST_SET):
            return
        if iteration not in self.record.evaluations:  # the last iteration may be evaluated twice
            # Only the last pipeline stage has the value; the last rank belongs to it in every layout.
            value = torch.tensor([self.measured], dtype=torch.float64, device=f"cuda:{torch.cuda.current_device()}")
            torch.distributed.broadcast(value, torch.distributed.get_world_size() - 1)
            self.record.evaluations[iteration] = value.item()
        if prefix.endswith(ON_VALIDATION_SET):  # the run is saved, and ends
            self.keep(iteration)
            log.info(f"early stopping: {self.record.describe_best(self.args.save)}")

    def save_checkpoint(self, stock: Callable[..., None], iteration: int, *rest: Any, **options: Any) -> None:
        stock(iteration, *rest, **options)
        self.saved = iteration

    def checkpoint_and_decide_exit(self, stock: Callable[..., bool], model: Any, optimizer: Any, scheduler: Any,
                                   iteration: int, *rest: Any) -> bool:
        if iteration not in self.record.evaluations:
            return stock(model, optimizer, scheduler, iteration, *rest)
        tired = self.record.evaluations_since_best >= self.args.early_stopping
        self.record.stopped = iteration if tired else None
        self.write()  # before the save, so that a start that resumes from it knows
        ends = stock(model, optimizer, scheduler, iteration, *rest)
        if tired or self.record.best == iteration:
            flops, context, rows = rest
            megatron_training.save_checkpoint_and_time(iteration, model, optimizer, scheduler, flops, context,
                                                       train_data_iterator=rows)
        self.keep(iteration)
        if tired:
            log.info(f"early stopping: {self.args.early_stopping} evaluations without a better one, stopped at step "
                     f"{iteration}; {self.record.describe_best(self.args.save)}")
            self.args.train_iters = iteration  # ends Megatron's loop; the test follows
        return ends

    def keep(self, iteration: int) -> None:
        """Write the record; if the best iteration changed, the previous best may be deleted."""
        former, self.kept = self.kept, self.record.best
        self.write()
        latest = self.saved or self.args.iteration
        if former != self.kept and latest and not torch.distributed.get_rank():
            delete_older(self.args, latest)

    def write(self) -> None:
        on_rank_0(functools.partial(self.record.write, self.args.save))
