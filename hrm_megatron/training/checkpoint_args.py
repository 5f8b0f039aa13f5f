"""`--use-checkpoint-args`: take the model's sizes and settings from the checkpoint that the run loads."""
from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrm_megatron.checkpoint.archive import DamagedError
from hrm_megatron.checkpoint.folders import last_saved_first, read_run
from hrm_megatron.checkpoint.fsdp_folder import open_run
from hrm_megatron.config import PRESETS, ConfigError
from hrm_megatron.training.checkpoint import refuse_to_keep, starting_point, starts_new

log = logging.getLogger(__name__)

# Argument to its flag: everything in an Architecture except the vocabulary, which the data decide.
MODEL_ARGUMENTS = {
    **{name: f"--{name.replace('_', '-')}" for name in (
        "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "h_cycles", "l_cycles",
        "norm_placement", "attention_mask", "attention_gate", "init_scheme", "init_std", "rotary_base")},
    "layernorm_epsilon": "--norm-epsilon", "model_kind": "--model-type",
}
OF_A_PRESET = ("num_layers", "hidden_size", "num_attention_heads")


def take_model(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Set the model's arguments from the checkpoint. Unless `given` on the command line, also take the row length, the
    gradient ticks of a fine-tuning or evaluation, and the learning rate of a run that keeps the checkpoint's schedule.

    If there is no checkpoint yet, the command line's values stay.
    """
    folder = starting_point(args)
    if folder is None:
        if args.num_layers is None and not args.hrm_preset:
            raise ConfigError(f"--use-checkpoint-args: none at {args.load} yet, and --num-layers is not set: give the "
                              f"model's sizes, or a --hrm-preset ({', '.join(PRESETS)})")
        log.info(f"checkpoint: --use-checkpoint-args: none at {args.load} yet; sizes are the command line's")
        return
    common = _common_of(folder, args.load_newest_valid)
    stored: argparse.Namespace = common["args"]
    check_given(given, stored, folder)
    for name in MODEL_ARGUMENTS:
        setattr(args, name, getattr(stored, name))
    if args.seq_length is None:
        args.seq_length = stored.seq_length
    if (args.finetune or args.skip_train) and args.bp_max_steps is None:  # the gradient ticks of its last step
        args.bp_max_steps = stored.bp_max_steps
    keeps_schedule = args.use_checkpoint_opt_param_scheduler and not starts_new(args, folder)
    if keeps_schedule and args.lr is None:  # the rest is taken when schedules are compared (resume.py)
        refuse_to_keep(args, folder, common)
        args.lr = stored.lr
    log.info(f"checkpoint: {folder}: model " + ", ".join(f"{name} {getattr(args, name)}" for name in MODEL_ARGUMENTS))


def _common_of(folder: Path, or_of_another: bool) -> dict[str, Any]:
    """Return the common state stored in this iteration or, if `or_of_another`, in the newest other readable one."""
    others = last_saved_first(folder.parent) if or_of_another else []
    *first, last = (folder, *(folder.parent / name for name in others))
    for path in first:
        with contextlib.suppress(DamagedError):  # reported when the iteration is verified
            return _stored(path)
    return _stored(last)


def _stored(folder: Path) -> dict[str, Any]:
    common, architecture = read_run(open_run(folder))
    stored = common["args"]
    # Older versions did not store these.
    stored.model_kind, stored.attention_mask = architecture.model_type, architecture.attention_mask
    stored.attention_gate = architecture.attention_gate
    return common


def of_preset(preset: str, model_type: str, name: str) -> Any:
    """Return a size of the preset's model for this model type."""
    return getattr(PRESETS[preset].architecture(model_type=model_type), name)


def check_given(given: Mapping[str, Any], stored: argparse.Namespace, folder: Path) -> None:
    """Refuse a flag or preset on the command line that contradicts the checkpoint."""
    asked = {flag: (given[name], name) for name, flag in MODEL_ARGUMENTS.items() if name in given}
    if preset := given.get("hrm_preset"):
        for name in OF_A_PRESET:
            if MODEL_ARGUMENTS[name] not in asked:
                size = of_preset(preset, stored.model_kind, name)
                asked[f"--hrm-preset {preset} with {MODEL_ARGUMENTS[name]}"] = size, name
    for flag, (value, name) in asked.items():
        if value != getattr(stored, name):
            raise ConfigError(f"{flag} {value}: is incompatible with --use-checkpoint-args: {folder} has "
                              f"{getattr(stored, name)}; leave one of them out")
