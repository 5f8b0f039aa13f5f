"""Non-finite gradients: skip the step, and after N consecutive ones roll back to the last checkpoint.

Loss spikes roll back in the same way (training/loss_spikes.py).

A skipped step changes no weight, master, moment, EMA or update count on any rank. Its rows count as consumed, and the
learning rate and gradient ticks follow the iteration, so the run is bitwise equal to one that was started with
Megatron's --iterations-to-skip for that step.
"""
from __future__ import annotations

import argparse
import functools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import training as megatron_training

from hrm_megatron.checkpoint.folders import last_saved_first, read_run
from hrm_megatron.checkpoint.fsdp_folder import open_run
from hrm_megatron.config import ConfigError
from hrm_megatron.optim.builder import make_states
from hrm_megatron.parallel.patching import around
from hrm_megatron.training.error_file import WentBackError
from hrm_megatron.training.run_files import on_rank_0, read_record, write_file

ABORT, SKIP, ROLLBACK = POLICIES = ("abort", "skip", "rollback")
IGNORE, WARN, _ = SPIKE_POLICIES = ("ignore", "warn", ROLLBACK)
RECORD = "bad_steps.json"  # beside the checkpoints
ROLLBACK_AFTER = 3  # consecutive steps
MOST_RETURNS = 3  # rollbacks to one checkpoint, or to others with the same weights
# Returned by Megatron's train_step: losses, skipped, save now, exit now, exit code, grad norm, zeros in grads, logit.
SKIPPED = 1
NOT_TAKEN: tuple[Any, ...] = {}, 1, False, False, 0, None, None, None

log = logging.getLogger(__name__)


@dataclass
class Record:
    """The rollbacks of a run: `steps` whose rows are skipped, and the number of rollbacks per checkpoint, keyed by the
    last step before it whose update was applied."""

    steps: list[int] = field(default_factory=list)
    returns: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Record:
        """Return the record of a run, or an empty one if there is none."""
        return read_record(
            file, lambda found: cls([int(step) for step in found["steps"]],
                                    {str(step): int(count) for step, count in found["returns"].items()}),
            "is no record of bad steps", "remove it to train on all rows") or cls()

    def write(self, save: str) -> None:
        write_file(save, RECORD, json.dumps(asdict(self)) + "\n")


def check_policy(args: argparse.Namespace) -> None:
    """Refuse invalid policies; add the steps that an earlier start has rolled back from to --iterations-to-skip."""
    policies = {"--on-nonfinite": (args.on_nonfinite, ABORT), "--on-loss-spike": (args.on_loss_spike, IGNORE)}
    asked = {f"{flag} {policy}": policy for flag, (policy, default) in policies.items() if policy != default}
    for policy in asked:
        if args.skip_train:
            raise ConfigError(f"{policy}: has no effect with --skip-train; leave one of them out")
    if args.on_nonfinite != ABORT:
        check_gradients_are_read(args)
    going_back = next((policy for policy, what in asked.items() if what == ROLLBACK), None)
    if going_back is None:
        if args.rollback_after is not None:
            raise ConfigError(f"--rollback-after {args.rollback_after}: has no effect without --on-nonfinite rollback "
                              "or --on-loss-spike rollback; give one of them, or leave it out")
        return
    if not args.save or args.save != args.load:
        raise ConfigError(f"{going_back}: goes back to the last checkpoint of --save {args.save}, but --load is "
                          f"{args.load}; give both the same folder")
    args.rollback_after = ROLLBACK_AFTER if args.rollback_after is None else args.rollback_after
    file = Path(args.save) / RECORD
    if steps := Record.read(file).steps:
        log.info(f"bad steps: rows of {named(steps)} are left out, which this run has gone back from ({file})")
        args.iterations_to_skip = sorted({*args.iterations_to_skip, *steps})


def check_gradients_are_read(args: argparse.Namespace) -> None:
    """Refuse a policy where Megatron does not check gradients."""
    policy = f"--on-nonfinite {args.on_nonfinite}"
    if args.fp16 and not args.loss_scale:  # with dynamic loss scaling Megatron disables the check
        raise ConfigError(f"{policy}: --fp16 without --loss-scale takes no such step by itself, and lowers its scale; "
                          "leave the policy out, or give --loss-scale")
    if not args.check_for_nan_in_loss_and_grad:
        raise ConfigError(f"{policy}: looks at nothing with --no-check-for-nan-in-loss-and-grad; leave one of them out")
    if args.use_torch_fsdp2 or args.use_megatron_fsdp:
        raise ConfigError(f"{policy}: gradients are checked where Megatron's DDP reduces them, and not under FSDP; "
                          "leave it or the FSDP flag out")


def named(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(map(str, steps))}"


def warn_once(what: str) -> None:
    """Warn from rank 0 only: the console shows warnings of every rank."""
    if not torch.distributed.get_rank():
        log.warning(what)


class BadSteps:
    """Policies `skip` and `rollback` of --on-nonfinite; all ranks decide alike."""

    def __init__(self, args: argparse.Namespace, running_step: Callable[[], int]) -> None:
        self.args, self.running_step = args, running_step
        self.bad = False
        self.in_a_row: list[int] = []
        self.count = 0

    def judge(self, norm: torch.Tensor) -> None:
        """Decide, with all other ranks, whether to skip the current step; `norm` [] of this rank's gradients is NaN or
        Inf if any of them is."""
        # All-reduce one number: the last rank, counted from 1, with a non-finite gradient.
        rank = torch.distributed.get_rank()
        worst = torch.where(torch.isfinite(norm), 0, rank + 1).to(torch.int64)
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        found = int(worst)
        self.bad = found > 0
        if not self.bad:
            self.in_a_row = []
            return
        self.count += 1
        self.in_a_row.append(self.running_step())
        warn_once(f"step {self.running_step()}: not taken: gradients on rank {found - 1} are not finite "
                  f"({len(self.in_a_row)} in a row, {self.count} since the start)")

    def guard(self, optimizer: Any) -> None:
        """Wrap the optimizer's `step` so that bad steps are skipped."""
        optimizer.step = functools.partial(self.step, optimizer.step)

    def step(self, stock: Callable[[], tuple[bool, Any, Any]]) -> tuple[bool, Any, Any]:
        """Run the optimizer's step, or skip it, which Megatron counts as a skipped iteration; may roll back."""
        if not self.bad:
            return stock()
        if self.args.on_nonfinite == ROLLBACK and len(self.in_a_row) >= self.args.rollback_after:
            go_back(self.args, self.in_a_row, "gradients are not finite")
        return False, None, None


def last_step_taken(common: dict[str, Any]) -> int:
    """Return the last step before a checkpoint whose update was applied; steps skipped since then change no weight."""
    taken = getattr(common["args"], "last_step_taken", None)
    return int(common["iteration"] if taken is None else taken)


def note_return(save: str, steps: list[int]) -> tuple[int, int]:
    """Record these steps; return the last step applied before the checkpoint that the next start loads, and the number
    of rollbacks to it, this one included."""
    record = Record.read(Path(save) / RECORD)
    saved = last_saved_first(Path(save))
    taken = last_step_taken(read_run(open_run(Path(save) / saved[0], verify=False))[0]) if saved else 0
    returns = record.returns.get(str(taken), 0) + 1
    if returns <= MOST_RETURNS:
        Record(sorted({*record.steps, *steps}), {**record.returns, str(taken): returns}).write(save)
    return taken, returns


def go_back(args: argparse.Namespace, steps: list[int], why: str) -> NoReturn:
    """Record these consecutive steps and end the run with an error: the same command resumes from the last checkpoint.

    Raises WentBackError, or ConfigError after MOST_RETURNS rollbacks to the same weights.
    """
    taken, returns = on_rank_0(functools.partial(note_return, args.save, steps))
    torch.distributed.barrier()  # a launcher kills all ranks once the first has ended
    what = f"{named(steps)}: {why}, {len(steps)} in a row"
    if returns > MOST_RETURNS:
        raise ConfigError(f"{what}, and this run has gone back to step {taken} {MOST_RETURNS} times: its rows are "
                          "not the reason; look at the data, the rate and the device, or load an older step")
    raise WentBackError(f"{what}; the same command goes on from the last checkpoint and leaves their rows out "
                        f"({Path(args.save) / RECORD})")


def pass_over(data_iterator: Iterator[Any] | list[Iterator[Any]]) -> None:
    """Read the rows of a step without training on them: on every rank, in a pipeline for its first chunk."""
    iterator = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
    machine = get_rerun_state_machine()
    while machine.should_run_forward_backward(data_iterator):
        for _ in range(get_num_microbatches()):
            next(iterator)


def install_bad_steps(args: argparse.Namespace, running_step: Callable[[], int]) -> BadSteps | None:
    """Let Megatron's loop skip steps; return a BadSteps for --on-nonfinite skip and rollback, None for abort.

    With stock --iterations-to-skip the evaluation, checkpoint and exit checks due at a skipped step are skipped too,
    and a run whose last step is skipped ends without a save. Here they still happen.
    """
    args.steps_left_out, args.iterations_to_skip = args.iterations_to_skip, []
    args.last_step_taken = getattr(args, "last_step_taken", 0)  # both are saved in checkpoints

    def train_step(stock: Callable[..., Any], forward_step: Any, data_iterator: Any, model: Any, optimizer: Any,
                   scheduler: Any, *rest: Any, iteration: int, **options: Any) -> Any:
        if iteration + 1 in args.steps_left_out:
            pass_over(data_iterator)
            log.info(f"step {iteration + 1}: left out, its rows are passed over")
            done = NOT_TAKEN
        else:
            done = stock(forward_step, data_iterator, model, optimizer, scheduler, *rest, iteration=iteration,
                         **options)
        if done[SKIPPED]:  # the side effects of an optimizer step
            args.skipped_train_samples += args.global_batch_size
            make_states(optimizer)
            scheduler.step(0)
        else:
            args.last_step_taken = iteration + 1
        return done

    megatron_training.train_step = around(megatron_training.train_step, train_step)
    if args.on_nonfinite == ABORT:
        return None
    return BadSteps(args, running_step)
