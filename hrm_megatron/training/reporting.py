"""Report steps, evaluations and saves of Megatron's loop on the console, and count the FLOPs of an HRM."""
from __future__ import annotations

import argparse
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.training import training as megatron_training

from hrm_megatron.checkpoint.iterations import folder_name
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.model.ticks import ticks_of
from hrm_megatron.parallel.patching import around
from hrm_megatron.planner.flops import rows_flops
from hrm_megatron.planner.machines import known_peak
from hrm_megatron.training.bad_steps import ABORT
from hrm_megatron.training.console import Console
from hrm_megatron.training.console_lines import StepReport, TimeLeft, evaluation_line, saved_line, step_line
from hrm_megatron.training.data import first_rows
from hrm_megatron.training.evaluation import Evaluation
from hrm_megatron.training.lora import lora_of
from hrm_megatron.training.metrics import SPEED
from hrm_megatron.training.scalars import flush_scalars, write_scalars
from hrm_megatron.training.step import TrainingStep
from hrm_megatron.training.summary import describe_checkpoint, describe_schedule, only_evaluates
from hrm_megatron.transformer_config import architecture_of

TERA = 1e12
MFU, SAVE_SECONDS = "MFU", "seconds of save"  # curve names; for an asynchronous save, the time that training waits
FLOPS = "FLOPs"  # per step; key in the means of an interval

log = logging.getLogger(__name__)


def install_console(args: argparse.Namespace, console: Console, step: TrainingStep,
                    evaluation: Evaluation) -> Reporter:
    """Wrap Megatron's reporting functions; what it prints, and writes to TensorBoard and W&B, stays as it is.

    Call it after everything else that replaces the same functions.
    """
    reporter = Reporter(args, console, step, evaluation)
    megatron_training.training_log = around(megatron_training.training_log, reporter.training_log)
    megatron_training.evaluate = around(megatron_training.evaluate, reporter.evaluate)
    megatron_training.evaluate_and_print_results = around(megatron_training.evaluate_and_print_results,
                                                           reporter.evaluate_and_print_results)
    megatron_training.save_checkpoint = around(megatron_training.save_checkpoint, reporter.save_checkpoint)
    megatron_training.num_floating_point_operations = lambda *_, **__: reporter.flops()
    # It uses a GPT's formula; our count is in the facts before step 1.
    megatron_training.report_theoretical_memory = lambda *_, **__: None
    return reporter


class Reporter:
    """The wrappers of `install_console`; each gets the function that it wraps as first argument."""

    def __init__(self, args: argparse.Namespace, console: Console, step: TrainingStep,
                 evaluation: Evaluation) -> None:
        self.args, self.console, self.running, self.evaluation = args, console, step, evaluation
        self.architecture = architecture_of(args, args.vocab_size)
        passes = functools.cache(functools.partial(tick_passes, args))
        self.time_left = TimeLeft([passes(step.bp_schedule.at(i + 1)) for i in range(args.train_iters)], time.monotonic)
        self.sample: list[Sequence[tuple[int, int]]] = []
        self.labels = 0
        self.flops_at: dict[int, int] = {}  # by bp_steps
        self.means, self.overflows, self.part = IntervalMeans(), 0, ""
        # None for a GPU whose peak is unknown: then no MFU is written.
        self.peak = known_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None

    def begin(self, train_rows: PackedRows | None) -> None:
        """Show the facts about the run; everything is ready for its first step."""
        if train_rows is not None:
            self.sample, self.labels = first_rows(train_rows)
        facts = [describe_checkpoint(self.args)]
        if not (self.args.skip_train or only_evaluates(self.args)):
            facts.append(describe_schedule(self.args, self.running.bp_schedule))
        for fact in facts:
            log.info(fact)
        self.console.begin(vars(self.args))
        self.time_left.start(self.args.iteration)

    def flops(self) -> int:
        """Return the FLOPs of the last step, the same on every rank, estimated from the first rows of the run."""
        bp_steps = self.running.bp_steps
        if self.sample and bp_steps not in self.flops_at:
            flops = rows_flops(self.architecture, bp_steps, self.args.seq_length, self.sample, self.labels,
                               lora_of(self.args))
            self.flops_at[bp_steps] = flops * int(self.args.global_batch_size) // len(self.sample)
        return self.flops_at.get(bp_steps, 0)

    def training_log(self, stock: Callable[..., bool], losses: dict[str, torch.Tensor], totals: dict[str, Any],
                     lr: float | None, iteration: int, loss_scale: float, report_memory: bool, skipped: int,
                     *rest: Any, is_first_iteration: bool = False, **options: Any) -> bool:
        report_memory = stock(losses, totals, lr, iteration, loss_scale, report_memory, skipped, *rest,
                              is_first_iteration=is_first_iteration, **options)
        if not self.console.last:
            return report_memory
        if not skipped:
            self.means.add(losses, self.flops() if self.args.log_throughput else 0)
        elif self.args.on_nonfinite == ABORT and iteration not in self.args.steps_left_out:  # else reported already
            self.overflows += 1
        if iteration % self.args.log_interval == 0 or is_first_iteration:
            if self.overflows:
                steps = self.args.train_iters
                self.console.line(f"step {iteration:{len(str(steps))}}/{steps}  {self.overflows} not taken: gradients "
                                  f"overflowed; the loss scale is now {loss_scale:g}")
                self.overflows = 0
            if self.means.steps:
                report = self.report(iteration, self.means.take(), lr)
                self.console.line(step_line(report, self.console.width))
                if report.tflops and self.peak and not is_first_iteration:
                    write_scalars({MFU: report.tflops * TERA / self.peak}, iteration)
            flush_scalars()
        if is_first_iteration:  # slower than later steps
            self.time_left.start(iteration)
        self.console.progress(iteration, self.args.train_iters)
        return report_memory

    def report(self, iteration: int, means: dict[str, float], lr: float | None) -> StepReport:
        """Return the values of a step's line."""
        loss, exact, bp_steps, speed, flops = (means.get(name, float("nan")) for name in (
            "lm loss", "exact accuracy", "bp steps", SPEED, FLOPS))
        tflops = None
        if self.args.log_throughput:
            steps_per_second = speed / (self.args.global_batch_size * self.args.seq_length)
            tflops = flops * steps_per_second / TERA / self.args.world_size
        return StepReport(iteration, self.args.train_iters, loss, exact, bp_steps, float("nan") if lr is None else lr,
                          speed, self.time_left.after(iteration), tflops)

    def evaluate_and_print_results(self, stock: Callable[..., None], prefix: str, *rest: Any, **options: Any) -> None:
        self.part = "test" if "test set" in prefix else "validation"
        with self.running.meter.paused():
            stock(prefix, *rest, **options)

    def evaluate(self, stock: Callable[..., Any], *rest: Any, **options: Any) -> Any:
        begun = time.monotonic()
        found = means, _, _ = stock(*rest, **options)
        if means and self.console.last:
            values = {name: float(value) for name, value in means.items()}
            steps = max(self.done, self.args.train_iters)  # train_iters may be 0 with --skip-train
            self.console.line(evaluation_line(self.done, steps, self.part + self.evaluation.suffix, values,
                                              time.monotonic() - begun, self.console.width))
        return found

    def save_checkpoint(self, stock: Callable[..., None], iteration: int, *rest: Any, **options: Any) -> None:
        begun = time.monotonic()
        with self.running.meter.paused():
            stock(iteration, *rest, **options)
        seconds = time.monotonic() - begun
        write_scalars({SAVE_SECONDS: seconds}, iteration)
        flush_scalars()
        if self.console.last:
            folder = f"{self.args.save}/{folder_name(iteration)}"
            self.console.line(saved_line(iteration, self.args.train_iters, folder, seconds,
                                         in_background=self.args.async_save))

    @property
    def done(self) -> int:
        """Number of steps done, between two steps."""
        return max(int(getattr(self.args, "curr_iteration", -1)) + 1, int(self.args.iteration))


class IntervalMeans:
    """Means over the steps since the previous line; Megatron's second line would also include the first step.

    The mean of SPEED is all tokens over all seconds: the harmonic mean, since all steps have equally many tokens.
    """

    def __init__(self) -> None:
        self.steps, self.flops, self.sums = 0, 0, dict[str, torch.Tensor]()

    def add(self, losses: dict[str, torch.Tensor], flops: int = 0) -> None:
        """Add the values and FLOPs of a step, without synchronizing."""
        self.steps += 1
        self.flops += flops
        for name, value in losses.items():
            value = value.detach()
            self.sums[name] = self.sums.get(name, 0) + (1 / value if name == SPEED else value)

    def take(self) -> dict[str, float]:
        """Return the means, with FLOPS if they were counted, and reset."""
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        if SPEED in means:
            means[SPEED] = 1 / means[SPEED]
        if self.flops:
            means[FLOPS] = self.flops / self.steps
        self.steps, self.flops, self.sums = 0, 0, {}
        return means


def tick_passes(args: argparse.Namespace, bp_steps: int) -> int:
    """Return the cost of a step in forward passes of a stack: 1 per tick, 3 for a tick with gradient."""
    return sum(3 if tick.with_grad else 1 for tick in ticks_of(architecture_of(args, args.vocab_size), bp_steps))
