"""Install all replacements and additions that an HRM needs in Megatron's training loop."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hrm_megatron.data.mixture import SourceNames
from hrm_megatron.training.bad_steps import install_bad_steps
from hrm_megatron.training.console import Console
from hrm_megatron.training.curves import install_curves
from hrm_megatron.training.data import Sources
from hrm_megatron.training.early_stopping import install_early_stopping
from hrm_megatron.training.evaluation import Evaluation, install_evaluation
from hrm_megatron.training.exit_signal import install_exit_signal
from hrm_megatron.training.finetune import install_finetune
from hrm_megatron.training.fsdp import install_fsdp
from hrm_megatron.training.guarded_saves import guard_saves
from hrm_megatron.training.loss_spikes import install_loss_spikes
from hrm_megatron.training.optimizer import install_optimizer
from hrm_megatron.training.overlap import install_overlap
from hrm_megatron.training.params_norm import install_params_norm
from hrm_megatron.training.reporting import Reporter, install_console
from hrm_megatron.training.source_losses import find_sources, install_source_losses
from hrm_megatron.training.step import TrainingStep
from hrm_megatron.training.two_phase_pipeline import install_schedule
from hrm_megatron.training.watchdog import Watchdog, install_watchdog


@dataclass(frozen=True)
class Loop:
    """The parts of the loop that the start and the end of a run use."""

    step: TrainingStep
    sources_by_name: SourceNames | None
    watchdog: Watchdog | None
    reporter: Reporter


def install_all(args: argparse.Namespace, console: Console, data: Sources, evaluation: Evaluation,
                install_eval_tasks: Callable[[], None], start: Path | None) -> Loop:
    """Replace functions of Megatron's loop; `start` is the iteration that the run loads, or None.

    Where several wrap the same function, the last one installed is called first. Curves and evaluations are installed
    before what may end the run at a step, so that this step is included; saves before early stopping, which observes
    them; the console, which reports on all of them, last.
    """
    sources_by_name = find_sources(args, data.train)
    step = TrainingStep(args, loads=start is not None)
    bad_steps = install_bad_steps(args, step.running_step)
    install_optimizer(args, step, [evaluation.use, *([bad_steps.guard] if bad_steps else [])])
    install_schedule(args, step)
    install_overlap(args, bad_steps.judge if bad_steps else None)
    install_fsdp(args)
    install_exit_signal(args)
    install_finetune(args)
    install_evaluation(args, evaluation)
    install_eval_tasks()
    install_curves(args, step)
    install_params_norm(args)
    install_source_losses(args, step, sources_by_name)
    guard_saves(args, start)
    install_loss_spikes(args)
    install_early_stopping(args)
    watchdog = install_watchdog(args, step)
    return Loop(step, sources_by_name, watchdog, install_console(args, console, step, evaluation))
