"""Which checkpoint a run resumes from, and what the two must agree on."""
from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hrm_megatron.checkpoint.archive import DamagedError
from hrm_megatron.checkpoint.folders import (
    complete_iterations,
    find_iteration,
    is_complete,
    last_saved_first,
    read_run,
)
from hrm_megatron.checkpoint.fsdp_folder import is_megatron_fsdp, open_run
from hrm_megatron.checkpoint.iterations import RELEASE, is_iteration, iteration_of
from hrm_megatron.checkpoint.manifest import TRACKER_FILE
from hrm_megatron.config import ConfigError
from hrm_megatron.optim.adam_atan2 import STATE_KEYS, state_key
from hrm_megatron.optim.builder import STEPS_DONE
from hrm_megatron.program import followed
from hrm_megatron.training.bad_steps import last_step_taken
from hrm_megatron.training.checkpoint_space import check_space, check_writable
from hrm_megatron.training.conversion_command import by_converting, converting
from hrm_megatron.training.early_stopping import stopped_early
from hrm_megatron.training.evaluation import RAW, Evaluation
from hrm_megatron.training.finetune import choose_source, go_on, how_to_evaluate, remark_on_weights
from hrm_megatron.training.going_back import correct_tracker, refuse_half_a_return, went_back
from hrm_megatron.training.lora import check_adapters, lora_of
from hrm_megatron.training.loss_spikes import take_losses
from hrm_megatron.training.resume import (
    KEEP,
    changes,
    check_model,
    check_plan,
    check_vocabulary,
    context_of,
    digest_of_data,
    length_asked,
    nothing_left,
    settle_length,
    settle_schedule,
)
from hrm_megatron.training.verification import check_integrity, check_verification_flags
from hrm_megatron.transformer_config import architecture_of

log = logging.getLogger(__name__)

FOREIGN_FORMATS = {"config.json": "hf", "all_config.yaml": "native"}  # recognized by this file


def starting_point(args: argparse.Namespace) -> Path | None:
    """Return the iteration that the run loads, or None for a run with new weights.

    After a kill during a save this is the latest complete iteration, whatever the tracker file says. A tracker file
    that names a complete iteration other than the latest is overruled only with --load-newest-valid. Writes nothing.
    """
    refuse_half_a_return(args)
    for flag, load in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        if load is None:
            continue
        if args.ckpt_step and not (args.finetune and flag == "--load") and not went_back(args):
            return find_iteration(load, args.ckpt_step)
        complete = last_saved_first(Path(load))
        if (Path(load) / TRACKER_FILE).exists() or complete:
            try:
                return find_iteration(load)
            except ConfigError as error:
                if not complete or (isinstance(error, DamagedError) and not args.load_newest_valid):
                    raise
                log.info(f"checkpoint: {error}; going on from {complete[0]}, the latest that is complete")
                return find_iteration(load, iteration_of(complete[0]))
        if form := _foreign_format(Path(load)):
            converted = f"{Path(load)}_megatron"
            raise ConfigError(f"{flag} {load}: a folder of the format {form}; convert it once, by "
                              f"`{converting(load, form, converted)}`, and give {converted}")
        place = followed(Path(load))
        if is_iteration(place.name) and is_complete(place):
            raise ConfigError(f"{flag} {load}: is one iteration; give {flag} {place.parent} --ckpt-step "
                              f"{iteration_of(place.name)}")
        begins_here = flag == "--load" and (args.pretrained_checkpoint or load == args.save)
        if not begins_here or args.exit_on_missing_checkpoint:
            raise ConfigError(f"{flag} {load}: no checkpoint there; correct the path, or leave the flag out to begin "
                              "with new weights")
    return None


def _foreign_format(folder: Path) -> str | None:
    """Return the format of the export in this folder, or None."""
    return next((form for file, form in FOREIGN_FORMATS.items() if (folder / file).is_file()), None)


def check_start(args: argparse.Namespace) -> Path | None:
    """Refuse a --save that belongs to something else or cannot be written, and flags that need a checkpoint where there
    is none.

    Returns the iteration to load, or None.
    """
    check_verification_flags(args)
    if args.save and not args.skip_train:
        check_writable(args)
    found = complete_iterations(Path(args.save)) if args.save else []
    if found and args.save != args.load:
        raise ConfigError(f"--save {args.save}: holds {found[-1]} of another run; give --load {args.save} to go on "
                          "with that, or another --save")
    if args.save and not found and (form := _foreign_format(Path(args.save))):
        raise ConfigError(f"--save {args.save}: holds a model of the format {form}, for which other tools would take "
                          "the folder; choose another")
    folder = starting_point(args)
    if folder is None and args.skip_train:
        raise ConfigError("--skip-train: no checkpoint to evaluate; give one with --load")
    if folder is not None:
        check_integrity(args, folder)
    return folder


def check_checkpoint(args: argparse.Namespace, evaluation: Evaluation) -> tuple[Path | None, bool]:
    """Refuse a --save without space, and a checkpoint that does not fit the run.

    Returns the iteration to load, or None, and whether anything is left to do. The iteration may still be damaged: that
    is checked later, by all ranks together. Call it under the lock of --save.
    """
    folder = check_start(args)
    if folder is not None:
        correct_tracker(args, folder)
    if made := went_back(args):
        log.info(made)
        # Megatron loads --ckpt-step, whatever else names an iteration.
        args.ckpt_step = iteration_of(folder.name) if folder else None
    if folder is not None:
        try:
            if not check_fit(args, evaluation, folder):
                return folder, False
        except DamagedError:
            if not args.verify_checkpoint:
                raise
    if args.save and not args.skip_train:
        check_space(args, architecture_of(args, args.vocab_size), steps_done(args, folder) if folder else 0)
    return folder, True


def open_of_model(args: argparse.Namespace, folder: Path, knows_vocabulary: bool) -> tuple[Any, dict[str, Any]]:
    """Return an opened iteration and its common state; refuse one whose model, format or, if known, vocabulary is not
    that of the command line."""
    stored = open_run(folder, args.verify_checkpoint)
    if args.dry_run or not args.verify_checkpoint:  # else the ranks divide this check as part of the verification
        stored.check_files()
    if is_megatron_fsdp(stored) != args.use_megatron_fsdp:
        with_or_without = "without" if args.use_megatron_fsdp else "with"
        or_convert = "" if args.use_megatron_fsdp else f", or convert it, {by_converting(folder, 'torch_dist')}"
        raise ConfigError(f"{folder}: saved {with_or_without} --use-megatron-fsdp, whose checkpoints have a format of "
                          f"their own; train {with_or_without} it{or_convert}")
    common, theirs = read_run(stored)
    ours = architecture_of(args, args.vocab_size if knows_vocabulary else theirs.vocab_size)
    check_model(folder, theirs, ours)
    if knows_vocabulary:
        check_vocabulary(folder, common["args"], args)
    check_adapters(folder, lora_of(common["args"]), lora_of(args), args.skip_train or starts_new(args, folder))
    return stored, common


def is_converted(common: dict[str, Any]) -> bool:
    """Tell whether an iteration with this common state was converted: of a schedule it stores only the step."""
    return STEPS_DONE in common.get("opt_param_scheduler", {})


def refuse_to_keep(args: argparse.Namespace, folder: Path, common: dict[str, Any]) -> None:
    """Raise ConfigError if the run is to keep the schedule of a converted checkpoint."""
    if args.use_checkpoint_opt_param_scheduler and is_converted(common):
        raise ConfigError(f"{KEEP}: {folder} was converted and holds no schedule; give --lr and the rest of one, and "
                          "leave the flag out")


def check_fit(args: argparse.Namespace, evaluation: Evaluation, folder: Path, knows_vocabulary: bool = True) -> bool:
    """Refuse an iteration that does not fit the command line, and decide which schedule the run follows from there.

    Returns whether anything is left to do: steps, or a missing final evaluation.
    """
    stored, common = open_of_model(args, folder, knows_vocabulary)
    if args.skip_train:
        return True
    args.context_tokens = max(args.seq_length, context_of(common["args"]))  # shorter rows do not reduce it
    keys = set(stored.keys())
    if starts_new(args, folder):
        if args.finetune:
            choose_source(args, folder, keys)
        else:
            remark_on_weights(folder, keys)
        if args.use_checkpoint_opt_param_scheduler:
            log.info(f"schedule: the command line's: {KEEP} takes none from {folder}, from which a new run begins")
        return True
    if args.finetune:
        go_on(args, folder, common["args"])
    iteration = int(common["iteration"])
    asked = length_asked(args)
    settle_length(args, common["args"], iteration)
    args.last_step_taken = last_step_taken(common)
    evaluation.go_on(common["args"])
    refuse_to_keep(args, folder, common)
    converted = is_converted(common)
    missing = None if args.no_load_optim else _missing_state(args, stored.shapes(), keys)
    finished, stopped = (nothing_left(iteration, args.train_iters, how_to_evaluate(args), asked),
                         stopped_early(args, iteration))
    if done := finished or stopped:
        of_this_run = bool(args.save) and folder.parent.resolve() == Path(args.save).resolve() and not converted
        ended = stopped or iteration == args.train_iters == common["args"].train_iters
        if not (of_this_run and ended and evaluation.is_left(args.save, iteration, bool(stopped))):
            log.info(f"checkpoint: {folder}: {done}")
            return False
        if because := _another_evaluation(args, common["args"], evaluation, missing):
            log.info(f"checkpoint: {folder}: {done}; its last evaluation is not made up: {because}")
            return False
        log.info(f"checkpoint: {folder}: iteration {iteration} of {args.train_iters} is done"
                 f"{', where the run was stopped early' if stopped else ''}; its last evaluation is made up")
        return True
    if not converted:
        check_plan(folder, common["args"], args)
    if missing:
        raise ConfigError(f"{folder}: holds no {missing}; give --finetune to begin at step 0, or --no-load-optim to go "
                          "on, with a new optimizer and an EMA that starts at its weights, or another --load")
    if not converted:
        if schedule := settle_schedule(args, common["args"], folder):
            log.info(schedule)
        if changed := changes(common["args"], args):
            log.info(f"checkpoint: {changed}")
        if not args.no_load_optim:  # with a new optimizer losses may differ
            take_losses(args, common["args"])
    return True


def _another_evaluation(args: argparse.Namespace, theirs: argparse.Namespace, evaluation: Evaluation,
                        missing: str | None) -> str | None:
    """Return why an evaluation would differ from that of the run that saved the checkpoint with arguments `theirs`, or
    None."""
    if missing or (args.no_load_optim and evaluation.weights != RAW):
        return "that needs the optimizer's state"
    if changed := changes(theirs, args):
        return changed
    held_out = [digest_of_data(of, "valid") for of in (theirs, args)]
    return "the examples that are held out are others now" if all(held_out) and held_out[0] != held_out[1] else None


def _missing_state(args: argparse.Namespace, shapes: Iterable[str], keys: set[str]) -> str | None:
    """Return the first optimizer state that a checkpoint with these weights and keys lacks, or None."""
    trains = (".lora.A", ".lora.B") if lora_of(args) else (".weight",)  # all others are frozen
    weights = [key for key in shapes if key.endswith(trains) and not key.startswith("optimizer.")]
    return next((f"{name} of the optimizer for {key}" for name in STATE_KEYS for key in weights
                 if state_key(name, key) not in keys), None)


def starts_new(args: argparse.Namespace, folder: Path) -> bool:
    """Tell whether Megatron will load only weights from `folder`: for fine-tuning, and from a release."""
    of_pretrained = args.load is None or folder.parent.resolve() != Path(args.load).resolve()
    return of_pretrained or folder.name == RELEASE


def steps_done(args: argparse.Namespace, folder: Path) -> int:
    """Return the number of steps already done by a run that loads this iteration."""
    return 0 if args.skip_train or starts_new(args, folder) else iteration_of(folder.name)
