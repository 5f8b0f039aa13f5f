"""Evaluations during training: which parts and weights they use, when they run, and how results are logged."""
from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.training import training as megatron_training
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import is_last_rank

from hrm_megatron.config import ConfigError, round_up
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.optim.averaged_weights import averaged_weights
from hrm_megatron.parallel.patching import around, temporarily
from hrm_megatron.program import write_aside

log = logging.getLogger(__name__)

# In the prefix of the test evaluation in Megatron's loop (training.py, pretrain).
ON_TEST_SET = "on test set"
RAW, EMA, BOTH = EVAL_WEIGHTS = ("raw", "ema", "both")
EVALUATED = "evaluated.json"  # beside the checkpoints
OF_EMA = " EMA"  # suffix of a part's name in results of the EMA


@dataclass
class Evaluation:
    """Which held-out parts are evaluated; `whole`: an evaluation reads all rows of its part, each once.

    `suffix` names the weights being evaluated: "" for raw weights, or OF_EMA. `validated`: the last iteration validated
    since this start.
    """

    validates: bool
    tests: bool
    whole: bool
    test_iters: int
    weights: str = RAW
    suffix: str = field(default="", init=False)
    validated: int | None = field(default=None, init=False)
    optimizer: Any = field(default=None, init=False)  # set once the loop has built it
    counted_passes: int = field(default=1, init=False)  # in the checkpoint's count of consumed validation rows

    def use(self, optimizer: Any) -> None:
        """Set the optimizer, which holds the EMA."""
        self.optimizer = optimizer

    @property
    def passes(self) -> int:
        """How many times an evaluation reads its rows."""
        return 2 if self.weights == BOTH else 1

    def go_on(self, theirs: argparse.Namespace) -> None:
        """Set how a checkpoint counts consumed validation rows: once per evaluation, older ones once per pass."""
        both = getattr(theirs, "eval_weights", RAW) == BOTH
        self.counted_passes = 2 if both and getattr(theirs, "counts_passes", True) else 1

    def is_left(self, save: str, iteration: int, stopped_early: bool) -> bool:
        """Tell whether the finished run in `save` lacks its final evaluation.

        A run that was stopped early has been validated there, and lacks at most the test.
        """
        try:
            evaluated = json.loads((Path(save) / EVALUATED).read_text(encoding="utf-8"))["iteration"]
        except (OSError, ValueError, TypeError, KeyError):
            evaluated = None
        return (self.tests or (self.validates and not stopped_early)) and evaluated != iteration

    def note_end(self, args: argparse.Namespace) -> None:
        """Record that the final evaluation of a finished run is complete; a failure is only a warning."""
        if args.rank or args.skip_train or not args.save:
            return
        try:
            write_aside(Path(args.save) / EVALUATED, json.dumps({"iteration": args.train_iters}) + "\n")
        except OSError as error:
            log.warning(f"--save {args.save}: cannot write {EVALUATED} ({error.strerror}); the same command would "
                        "evaluate this run once more")

    def cover(self, dataset: PackedRows, rows_per_iteration: int) -> int:
        """Return the number of iterations that read all rows of a part once; empty rows fill the last batch."""
        dataset.period = round_up(dataset.rows_per_epoch, rows_per_iteration)
        return dataset.period // rows_per_iteration


def settle_evaluation(args: argparse.Namespace, valid_examples: int, test_examples: int, absence: str) -> Evaluation:
    """Decide what is evaluated, and turn Megatron's evaluation off if there is nothing to evaluate.

    `absence` says why there are no validation examples. `--full-validation` is implemented here: Megatron's would
    repeat rows to fill a batch, and take the number of rows for a number of iterations.
    """
    whole, wanted = bool(args.full_validation), bool(args.full_validation or args.eval_iters)
    validates, tests = wanted and valid_examples > 0, wanted and test_examples > 0
    if args.skip_train and not (validates or tests):
        reason = absence if wanted else "--eval-iters is 0"
        raise ConfigError(f"--skip-train: nothing to evaluate: {reason}")
    if wanted and not validates:
        log.info(f"validation: off, {absence}")
    args.full_validation = False
    # For whole parts it is set again once the rows are counted.
    args.eval_iters = 1 if whole else args.eval_iters
    if not (validates or tests):
        args.eval_iters = 0
    check_weights(args, validates or tests)
    args.counts_passes = False  # stored in checkpoints
    return Evaluation(validates, tests, whole, args.eval_iters, args.eval_weights)


def check_weights(args: argparse.Namespace, evaluates: bool) -> None:
    """Refuse to evaluate an EMA that is not there, or that cannot change places with the weights."""
    if args.eval_weights == RAW:
        return
    flag = f"--eval-weights {args.eval_weights}"
    if args.skip_train:
        raise ConfigError(f"{flag}: --skip-train loads no EMA; convert the checkpoint with `--weights ema` and "
                          "evaluate that")
    if not evaluates:
        raise ConfigError(f"{flag}: has no effect, nothing is evaluated; leave it out, or give examples to validate "
                          "on and --eval-iters")
    if args.use_torch_fsdp2 or args.use_megatron_fsdp:
        raise ConfigError(f"{flag}: not built under FSDP; leave it or the FSDP flag out")
    if args.fp8_param_gather or args.fp4_param_gather:
        raise ConfigError(f"{flag}: quantized weights do not come back bitwise; leave it or --fp8-param-gather out")


def install_evaluation(args: argparse.Namespace, evaluation: Evaluation) -> None:
    """Let the loop evaluate only existing parts, complete each evaluation, log a test as a test, and validate an
    iteration only once (stock code repeats the validation of the last step at the end of the run)."""
    validate: Callable[..., None] = megatron_training.evaluate_and_print_results

    def to_its_end(stock: Callable[..., Any], *rest: Any, **options: Any) -> Any:
        with temporarily(args, exit_duration_in_mins=None):  # no later start would repeat an interrupted one
            return stock(*rest, **options)

    def evaluate_and_print_results(prefix: str, forward_step_func: Any, data_iterator: Any, model: Any, iteration: int,
                                   process_non_loss_data_func: Any, config: Any, verbose: bool = False,
                                   write_to_tensorboard: bool = True, non_loss_data_func: Any = None,
                                   **groups: Any) -> None:
        def evaluate(part: str, iters: int) -> None:
            means, *_ = megatron_training.evaluate(
                forward_step_func, data_iterator, model, process_non_loss_data_func, config, verbose,
                non_loss_data_func, eval_iters=iters, **groups)
            log_part(part, {name: mean.item() for name, mean in means.items()}, iteration,
                     args.consumed_train_samples, write_to_tensorboard)

        tests = prefix.endswith(ON_TEST_SET)
        if not (tests or (evaluation.validates and evaluation.validated != iteration)):
            return
        part, iters = ("test", evaluation.test_iters) if tests else ("validation", args.eval_iters)
        before = args.consumed_valid_samples
        if evaluation.weights != EMA:
            if not tests:
                validate(prefix, forward_step_func, data_iterator, model, iteration, process_non_loss_data_func, config,
                         verbose, write_to_tensorboard, non_loss_data_func, **groups)
            else:
                evaluate(part, iters)
        if evaluation.weights != RAW:
            evaluation.suffix = OF_EMA
            with averaged_weights(evaluation.optimizer, model):
                evaluate(part + OF_EMA, iters)
            evaluation.suffix = ""
        if not tests:
            args.consumed_valid_samples = before + iters * args.eval_global_batch_size  # for any number of passes
            evaluation.validated = iteration

    megatron_training.evaluate = around(megatron_training.evaluate, to_its_end)
    megatron_training.evaluate_and_print_results = evaluate_and_print_results


def log_part(part: str, means: dict[str, float], iteration: int, rows: int, write_to_tensorboard: bool) -> None:
    """Print the result of a part, and write it to TensorBoard and W&B as Megatron does."""
    writer, wandb = get_tensorboard_writer() if write_to_tensorboard else None, get_wandb_writer()
    for name, mean in means.items():
        if writer:
            writer.add_scalar(f"{name} {part}", mean, iteration)
            writer.add_scalar(f"{name} {part} vs samples", mean, rows)
        if writer and wandb and is_last_rank():
            wandb.log({f"{name} {part}": mean}, iteration)
    if is_last_rank():  # in Megatron's format, for its log
        print(f" {part} loss at iteration {iteration} | "
              + " | ".join(f"{name} value: {mean:.6E}" for name, mean in means.items()), file=sys.stdout, flush=True)
