"""Complete the arguments of a run from presets, checkpoint and machine, and check them before anything is built."""
from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import traceback
from collections.abc import Callable
from typing import Any

import torch
from megatron.training import arguments as megatron_arguments
from megatron.training.argument_utils import core_transformer_config_from_args

from hrm_megatron.attention.core import kernel_of
from hrm_megatron.attention.te_attention import check_backend
from hrm_megatron.config import PRESETS, Architecture, ConfigError, ffn_hidden_size, refuse_beside
from hrm_megatron.data.plan import PLAN_VERSION
from hrm_megatron.model.ticks import ticks_of
from hrm_megatron.model_types import MODEL_TYPES
from hrm_megatron.parallel.machine import Machine
from hrm_megatron.parallel.simulate import TWO_PHASE
from hrm_megatron.parallel.stages import microbatch_group
from hrm_megatron.planner.layout import Layout, check_division, check_pipeline, check_stages, cut_layers
from hrm_megatron.training.ablations import check_ablations
from hrm_megatron.training.bad_steps import check_policy
from hrm_megatron.training.checkpoint_args import take_model
from hrm_megatron.training.curve_flags import check_curves
from hrm_megatron.training.finetune import fill_settings, settle_folders
from hrm_megatron.training.flags.values import (
    check_batch,
    check_evaluation,
    check_pipeline_flags,
    check_profile,
    check_values,
)
from hrm_megatron.training.fsdp import choose_fsdp
from hrm_megatron.training.hardware import check_compilation, check_precision, choose_layers
from hrm_megatron.training.lora import settle_lora
from hrm_megatron.training.memory import check_memory, choose_recompute_modules
from hrm_megatron.training.micro_batch import choose_rows
from hrm_megatron.training.own_flags import FORCED, WITHOUT_CUDA, checked, default_of, given_by_hand
from hrm_megatron.training.step_schedules import bp_schedule, lr_schedule
from hrm_megatron.transformer_config import HRMConfig, architecture_of, swiglu_settings

log = logging.getLogger(__name__)

MOST_DRY_RANKS = 1024


def fill_cycles(args: argparse.Namespace) -> None:
    """Set cycles and gradient ticks that were not given to the model type's defaults."""
    for name in ("h_cycles", "l_cycles", "bp_max_steps"):
        if getattr(args, name) is None:
            setattr(args, name, default_of(MODEL_TYPES[args.model_kind], name))
    if args.bp_min_steps is None:
        args.bp_min_steps = min(default_of(MODEL_TYPES[args.model_kind], "bp_min_steps"), args.bp_max_steps)


def fill_from_preset(args: argparse.Namespace) -> None:
    """Set every size that was not given on the command line to the preset's value, or to its default."""
    fill_cycles(args)
    if args.match_flops_of:
        if args.hrm_preset not in (None, args.match_flops_of):
            raise ConfigError(f"--match-flops-of {args.match_flops_of}: takes the sizes of that preset, and "
                              f"--hrm-preset {args.hrm_preset} asks for others; leave one of them out")
        args.hrm_preset = args.match_flops_of
    preset = PRESETS[args.hrm_preset] if args.hrm_preset else None
    if preset:
        sizes = dict(vars(preset), num_layers=preset.architecture(model_type=args.model_kind).num_layers)
        for name in ("num_layers", "hidden_size", "num_attention_heads", "lr"):
            if getattr(args, name) is None:
                setattr(args, name, sizes[name])
    if args.skip_train and args.lr is None:
        args.lr = 0.0
    for name in ("num_layers", "hidden_size", "num_attention_heads", "lr", "seq_length"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name.replace('_', '-')} is not set: give it, or a --hrm-preset that has it "
                              f"({', '.join(PRESETS)})")
    if args.ffn_hidden_size is None:
        args.ffn_hidden_size = ffn_hidden_size(args.hidden_size)
    if args.global_batch_size is None and preset and preset.tokens_per_step:
        if preset.tokens_per_step % args.seq_length:
            raise ConfigError(f"--seq-length {args.seq_length} does not divide the preset's {preset.tokens_per_step} "
                              "tokens per step: give --global-batch-size (rows per step) by hand")
        args.global_batch_size = preset.tokens_per_step // args.seq_length
        args._is_global_batch_size_explicitly_specified = True
    if args.micro_batch_size is None:
        smaller = preset and args.num_layers <= preset.num_layers and args.hidden_size <= preset.hidden_size
        args.micro_batch_size = choose_rows(args, preset.positions if preset and smaller else 0)
    if args.min_lr is None:
        args.min_lr = args.lr  # HRM-Text, min_ratio 1: a constant rate after the warm-up
    if not 0 <= args.min_lr <= args.lr:
        raise ConfigError(f"--min-lr {args.min_lr} must lie between 0 and --lr {args.lr}")
    args.max_position_embeddings = args.seq_length  # unused by an HRM; Megatron requires at least seq_length


def layout_of(args: argparse.Namespace) -> Layout:
    """Return the layout that the arguments describe."""
    return Layout(args.world_size, args.tensor_model_parallel_size, args.pipeline_model_parallel_size,
                  args.context_parallel_size, args.sequence_parallel, args.seq_length, args.micro_batch_size,
                  args.global_batch_size)


def set_pipeline(args: argparse.Namespace, architecture: Architecture) -> None:
    """Make every tick a virtual chunk and split the layers over the stages; Megatron's flags for the first and last
    stage win."""
    check_pipeline(layout_of(args), args.pipeline_window)
    check_stages(args.num_layers, args.pipeline_model_parallel_size, args.decoder_first_pipeline_num_layers,
                 args.decoder_last_pipeline_num_layers)
    for flag, given in ((f"--pipeline-window {args.pipeline_window}", args.pipeline_window),
                        (f"--pipeline-schedule {TWO_PHASE}", args.pipeline_schedule == TWO_PHASE)):
        if architecture.num_ticks == 1 and given:
            raise ConfigError(f"{flag}: has no effect on a {architecture.kind.title}, whose single tick has no second "
                              "phase; leave it out")
    if architecture.num_ticks > 1:
        check_evaluation(args)
        args.num_virtual_stages_per_pipeline_rank = architecture.num_ticks
    if args.decoder_first_pipeline_num_layers is None and args.decoder_last_pipeline_num_layers is None:
        layers = cut_layers(architecture, args.pipeline_model_parallel_size, args.bp_max_steps)
        args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers = layers[0], layers[-1]


def set_dry_run(args: argparse.Namespace) -> None:
    """Use the dry run's number of ranks as the world size."""
    if (ranks := args.dry_run_ranks) is not None:
        args.world_size = ranks
    if not 1 <= args.world_size <= MOST_DRY_RANKS:
        raise ConfigError(f"--dry-run-ranks {args.world_size}: choose 1 to {MOST_DRY_RANKS}")
    if args.dry_run_rank is not None and not 0 <= args.dry_run_rank < args.world_size:
        raise ConfigError(f"--dry-run-rank {args.dry_run_rank}: choose 0 to {args.world_size - 1}")


def no_rows(args: argparse.Namespace) -> int:
    """Refuse `--epochs`: no data is open whose rows could be counted."""
    raise ConfigError(f"--epochs {args.epochs}: there is no data to count; give some, or --train-iters")


def parse_arguments(vocab_size_of: Any,
                    rows_of_epoch: Callable[[argparse.Namespace], int] = no_rows) -> argparse.Namespace:
    """Return the parsed, completed and checked command line.

    `vocab_size_of(args)` reads the vocabulary size from the data, `rows_of_epoch(args)` counts the rows of an epoch.
    Raises ConfigError with one line for every error that can be found before process groups exist.
    """
    args = megatron_arguments.parse_args(checked)
    for name in ("dry_run_ranks", "dry_run_rank"):
        if getattr(args, name) is not None and not args.dry_run:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} {getattr(args, name)}: has no effect without --dry-run; give that too, or "
                              "leave it out")
    if args.print_config:
        if not args.hrm_preset:
            raise ConfigError(f"--print-config: has no effect without --hrm-preset; give one of {', '.join(PRESETS)}")
        return args
    return complete(args, vocab_size_of, rows_of_epoch)


def complete(args: argparse.Namespace, vocab_size_of: Any,
             rows_of_epoch: Callable[[argparse.Namespace], int] = no_rows) -> argparse.Namespace:
    """Complete and check parsed arguments, see `parse_arguments`."""
    if args.dry_run:
        set_dry_run(args)
    settle_folders(args)
    if args.finetune and args.num_layers is None and not args.hrm_preset:
        args.use_checkpoint_args = True
    if args.use_checkpoint_args:
        take_model(args, given_by_hand(args))
    if args.finetune:
        fill_settings(args, given_by_hand(args))
    check_values(args, torch.cuda.is_available())
    fill_from_preset(args)
    for name, value in FORCED.items():
        setattr(args, name, value)
    choose_recompute_modules(args)
    settle_lora(args)
    machine = Machine.here()
    args.transformer_impl, layers = choose_layers(args.transformer_impl, args.compile_layers, machine)
    check_compilation(args, machine)
    check_precision(args, machine)
    log.info("layers: %s", layers)
    if not torch.cuda.is_available():
        for name, value in WITHOUT_CUDA.items():
            setattr(args, name, value)
    args.vocab_size = vocab_size_of(args)
    architecture = architecture_of(args, args.vocab_size)
    # Padded as in the reference and not by tensor parallel size, so that any layout loads any checkpoint.
    args.padded_vocab_size = architecture.padded_vocab_size
    settle_epochs(args, rows_of_epoch)
    check_division(architecture, layout_of(args))
    check_batch(args)
    check_memory(args, machine)
    choose_fsdp(args, architecture)
    for flag, bp_steps in (("--bp-max-steps", args.bp_max_steps), ("--bp-min-steps", args.bp_min_steps)):
        try:
            ticks_of(architecture, bp_steps)
        except ConfigError as error:
            raise ConfigError(f"{error} by {flag}") from error
    check_pipeline_flags(args)
    if args.pipeline_model_parallel_size > 1:
        set_pipeline(args, architecture)
    args.plan_version = PLAN_VERSION  # so that a checkpoint records the order of its rows
    args.optimizer = "adam"  # the name that Megatron accepts; optim.builder replaces its Adam by AdamATan2
    try:
        megatron_arguments.validate_args(args)
    except AssertionError as error:
        reason = str(error) or f"Megatron demands `{traceback.extract_tb(error.__traceback__)[-1].line}`"
        raise ConfigError(f"command line: {reason}") from error
    # Refuse an impossible kernel now.
    check_backend(kernel_of(args.attention_kernel, args.params_dtype, architecture.head_dim), args.attention_backend)
    if args.train_iters is None and args.train_samples:
        args.train_iters = args.train_samples // args.global_batch_size
    refuse_beside("--override-opt-param-scheduler", {
        "--use-checkpoint-opt-param-scheduler": args.override_opt_param_scheduler
        and args.use_checkpoint_opt_param_scheduler})
    check_profile(args)
    check_policy(args)
    check_ablations(args)
    check_curves(args)
    if args.skip_train:
        args.train_iters = args.train_iters or 0
        args.gradient_accumulation_fusion = False  # no DDP, which would allocate the gradient buffers
        return args
    if not args.train_iters:
        raise ConfigError("--train-iters (or --epochs, --train-samples) is not set: say how long to train")
    bp_schedule(args), lr_schedule(args)  # refuse impossible schedules now
    return args


def settle_epochs(args: argparse.Namespace, rows_of_epoch: Callable[[argparse.Namespace], int]) -> None:
    """Convert --epochs to a number of steps, rounded up, by the rows of the first epoch."""
    args.rows_of_epochs = None
    if args.epochs is None:
        return
    refuse_beside(f"--epochs {args.epochs}", {"--train-iters": args.train_iters, "--train-samples": args.train_samples,
                                              "--skip-train": args.skip_train})
    if not args.global_batch_size:
        raise ConfigError(f"--epochs {args.epochs}: --global-batch-size is not set: say how many rows a step has")
    args.rows_of_epochs = args.epochs * rows_of_epoch(args)
    args.train_iters = math.ceil(args.rows_of_epochs / args.global_batch_size)


def microbatches_of(args: argparse.Namespace) -> int:
    """Return the number of micro-batches per step on each replica."""
    return int(args.global_batch_size // (args.micro_batch_size * args.data_parallel_size))


def model_config(args: argparse.Namespace) -> HRMConfig:
    """Return the TransformerConfig of a run."""
    # Megatron would require layers divisible by chunks; here each chunk runs all layers of its stage.
    whole = argparse.Namespace(**{**vars(args), "virtual_pipeline_model_parallel_size": None})
    try:
        config: HRMConfig = core_transformer_config_from_args(whole, HRMConfig)
    except ValueError as error:
        raise ConfigError(f"command line: {' '.join(str(error).split())}") from error
    architecture = architecture_of(args, args.vocab_size)
    own: dict[str, Any] = dict(architecture=architecture, attention_output_gate=architecture.gated,
                               **swiglu_settings(args.compile_layers or args.recompute_gated_act))
    config = dataclasses.replace(config, **own)
    if args.virtual_pipeline_model_parallel_size:
        config.virtual_pipeline_model_parallel_size = args.virtual_pipeline_model_parallel_size
        config.microbatch_group_size_per_vp_stage = microbatch_group(microbatches_of(args),
                                                                     args.pipeline_model_parallel_size)
    return config
