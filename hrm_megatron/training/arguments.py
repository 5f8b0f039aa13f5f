"""The command line: all of Megatron's flags plus one group of ours, checked before anything is built."""
from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import arguments as megatron_arguments
from megatron.training.argument_utils import core_transformer_config_from_args

from hrm_megatron.attention.core import KERNELS, explain_kernel
from hrm_megatron.attention.kernel_choice import AUTO
from hrm_megatron.config import (
    INIT_SCHEMES,
    NORM_PLACEMENTS,
    PRESETS,
    Architecture,
    ConfigError,
    ffn_hidden_size,
    refuse_beside,
)
from hrm_megatron.data.plan import PLAN_VERSION
from hrm_megatron.model.schedule import ticks_of
from hrm_megatron.model_types import HRM, MODEL_TYPES, ModelType
from hrm_megatron.parallel.machine import Machine
from hrm_megatron.parallel.simulate import AUTO as AUTO_SCHEDULE
from hrm_megatron.parallel.simulate import SCHEDULES
from hrm_megatron.parallel.stages import microbatch_group
from hrm_megatron.planner.layout import Layout, check_division, check_pipeline, cut_layers
from hrm_megatron.training.ablations import add_ablations, check_ablations
from hrm_megatron.training.bad_steps import ABORT, IGNORE, POLICIES, ROLLBACK_AFTER, SPIKE_POLICIES, check_policy
from hrm_megatron.training.checkpoint_args import take_model
from hrm_megatron.training.curve_flags import add_curves, check_curves
from hrm_megatron.training.evaluation import EVAL_WEIGHTS, RAW
from hrm_megatron.training.finetune import SOURCES, fill_settings, settle_folders
from hrm_megatron.training.flags.check import check_flags, given
from hrm_megatron.training.flags.help import prepare
from hrm_megatron.training.flags.values import check_batch, check_values
from hrm_megatron.training.fsdp import choose_fsdp
from hrm_megatron.training.hardware import TRANSFORMER_IMPLS, check_compilation, check_precision, choose_layers
from hrm_megatron.training.lora import add_lora, settle_lora
from hrm_megatron.training.memory import check_memory, choose_recompute_modules
from hrm_megatron.training.micro_batch import choose_rows
from hrm_megatron.training.step_schedules import bp_schedule, lr_schedule
from hrm_megatron.transformer_config import HRM_SETTINGS, HRMConfig, architecture_of, swiglu_settings

log = logging.getLogger(__name__)

OPTIMIZER = "adam_atan2"
MOST_DRY_RANKS = 1024

# Our defaults for Megatron's own flags; a flag given by hand wins.
DEFAULTS: dict[str, Any] = dict(
    clip_grad=0.0, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95,  # HRM-Text, cfg_pretrain
    lr_decay_style="cosine", min_lr=None,
    optimizer=OPTIMIZER, tokenizer_type="NullTokenizer", position_embedding_type="rope",
    transformer_impl=None,  # decided by training.hardware
    layernorm_epsilon=1e-6,  # HRM-Text, norm_eps
    ckpt_format="torch_dist", use_distributed_optimizer=True, dist_ckpt_optim_fully_reshardable=True,
    data_parallel_sharding_strategy="optim_grads_params", megatron_fsdp_main_grads_dtype="fp32",
    log_interval=10, eval_interval=1000, eval_iters=10, save_interval=1000, num_workers=2,
    split="97,3,0",  # for validation three in a hundred, and no test; Megatron's would be 969,30,1
)
# What makes the model an HRM: not the user's to choose.
FORCED: dict[str, Any] = dict(
    swiglu=True, bias_swiglu_fusion=False, untie_embeddings_and_output_weights=True, calculate_per_token_loss=True,
    create_attention_mask_in_dataloader=False, group_query_attention=False, num_query_groups=None, **HRM_SETTINGS,
)
# Fused kernels that exist only where CUDA, Apex or Transformer Engine do.
WITHOUT_CUDA: dict[str, Any] = dict(
    distributed_backend="gloo", use_cpu_initialization=True, num_workers=0,
    masked_softmax_fusion=False, no_persist_layer_norm=True,
)


def default_of(kind: ModelType, name: str) -> int:
    """Return a model type's default of cycles or gradient ticks."""
    return dict(h_cycles=kind.h_cycles, l_cycles=kind.l_cycles, bp_min_steps=kind.bp_steps[0],
                bp_max_steps=kind.bp_steps[1])[name]


def by_type(name: str) -> str:
    """Say what the default of a setting is for each model type."""
    return "default: " + ", ".join(f"{default_of(kind, name)} {model_type}" for model_type, kind in MODEL_TYPES.items())


def fill_cycles(args: argparse.Namespace) -> None:
    """Give cycles and gradient ticks that were not named the values of the model type."""
    for name in ("h_cycles", "l_cycles", "bp_min_steps", "bp_max_steps"):
        if getattr(args, name) is None:
            setattr(args, name, default_of(MODEL_TYPES[args.model_kind], name))


def add_hrm_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our group to Megatron's parser and set our defaults for its flags."""
    group = parser.add_argument_group("hrm")
    group.add_argument("--hrm-preset", choices=[*PRESETS],
                       help="model sizes, learning rate, global and micro-batch size; explicit flags override them")
    group.add_argument("--print-config", action="store_true",
                       help="print all that --hrm-preset sets, where it comes from and its layouts, and exit")
    group.add_argument("--epochs", type=int, metavar="N",
                       help="train for so many passes over the data, in place of --train-iters")
    group.add_argument("--finetune-from", choices=SOURCES,
                       help="what --finetune takes of a checkpoint: the EMA or the raw weights, with a new optimizer, "
                            "or all of its state (default: the EMA if it has one)")
    group.add_argument("--eval-weights", choices=EVAL_WEIGHTS, default=RAW,
                       help="weights of validation and test during training; both: the same rows by each")
    group.add_argument("--eval-tasks", nargs="+", metavar="TASK",
                       help="tasks of tools/evaluate.py that the EMA answers at every validation")
    group.add_argument("--eval-tasks-data", type=Path, metavar="DIR", help="rows: DIR/TASK/SPLIT.jsonl or .parquet")
    group.add_argument("--eval-tasks-limit", type=int, metavar="N", help="only the first N questions of each")
    group.add_argument("--eval-tasks-new-tokens", type=int, metavar="N",
                       help="at most so many per free answer (default: what --seq-length leaves room for)")
    group.add_argument("--early-stopping", type=int, metavar="N",
                       help="stop after N evaluations without a better exact accuracy of the validation set, by the "
                            "EMA if that is evaluated; the best iteration is saved and kept")
    group.add_argument("--dry-run", action="store_true",
                       help="build the run without weights, print parameters, data plan, memory and space, and exit")
    group.add_argument("--dry-run-ranks", type=int, metavar="N",
                       help="ranks of the dry run, up to 1024 (default: those that were started)")
    group.add_argument("--dry-run-rank", type=int, metavar="R",
                       help="also print the shapes of all weights of this rank of the dry run")
    # The name model_type is taken by Megatron.
    group.add_argument("--model-type", dest="model_kind", choices=[*MODEL_TYPES], default=HRM,
                       help="architecture: HRM, or one of HRM-Text's baselines")
    group.add_argument("--h-cycles", type=int,
                       help=f"H ticks (applications of the slow stack) per forward pass ({by_type('h_cycles')})")
    group.add_argument("--l-cycles", type=int,
                       help=f"L ticks (applications of the fast stack) before each H tick ({by_type('l_cycles')})")
    group.add_argument("--bp-min-steps", type=int, help="bp_steps, the ticks that carry gradients, at the first step "
                       f"({by_type('bp_min_steps')})")
    group.add_argument("--bp-max-steps", type=int, help=f"bp_steps after its warm-up ({by_type('bp_max_steps')})")
    group.add_argument("--match-flops-of", choices=[*PRESETS], metavar="PRESET",
                       help="train --model-type in the preset's sizes for as many FLOPs as its HRM needs for "
                            "--train-iters steps")
    group.add_argument("--bp-warmup-fraction", type=float, default=0.2,
                       help="fraction of the run over which bp_steps rises")
    group.add_argument("--ema-decay", type=float, default=0.9999, help="decay of the EMA of the weights")
    group.add_argument("--init-scheme", choices=INIT_SCHEMES, default="lecun_normal",
                       help="initialization of the weights")
    group.add_argument("--init-std", type=float, help="standard deviation of fixed_normal and megatron initialization")
    group.add_argument("--norm-placement", choices=NORM_PLACEMENTS, default="pre",
                       help="RMSNorm before attention and MLP, or after")
    group.add_argument("--recompute-ticks", type=int, default=0, metavar="K",
                       help="recompute the first K ticks with gradient in backward, keeping only their input")
    group.add_argument("--compile-layers", action="store_true",
                       help="fuse the element-wise operations of local layers with torch.compile (GPU only)")
    group.add_argument("--attention-kernel", choices=[AUTO, *KERNELS], default=AUTO,
                       help="attention implementation; auto: the fastest that can run, printed with the reason")
    group.add_argument("--pipeline-schedule", choices=SCHEDULES, default=AUTO_SCHEDULE,
                       help="auto: two-phase where a simulation predicts a smaller pipeline bubble")
    group.add_argument("--pipeline-window", type=int, metavar="N",
                       help="micro-batches per window of the two-phase schedule, bounds its memory (default: all)")
    group.add_argument("--sampled-data-path", metavar="DIR",
                       help="train on a `sampled` folder of HRM-Text's data pipeline")
    group.add_argument("--sampling-rules", metavar="FILE",
                       help="YAML list of rules: how many examples of each source file an epoch has")
    add_lora(group)
    add_ablations(group)
    group.add_argument("--verify-data", action="store_true",
                       help="verify the checksums of the data before training")
    group.add_argument("--no-verify-checkpoint", dest="verify_checkpoint", action="store_false",
                       help="load a checkpoint without verifying its checksums")
    group.add_argument("--load-newest-valid", action="store_true",
                       help="resume from the newest iteration that verifies if the latest one is damaged")
    group.add_argument("--most-recent-k", type=int, metavar="K", help="keep the last K checkpoints (default: all)")
    group.add_argument("--on-nonfinite", choices=POLICIES, default=ABORT,
                       help="a step whose gradients are not finite: end, do not take it, or also go back after several")
    group.add_argument("--rollback-after", type=int, metavar="K",
                       help=f"such steps in a row after which rollback goes back (default: {ROLLBACK_AFTER})")
    group.add_argument("--on-loss-spike", choices=SPIKE_POLICIES, default=IGNORE,
                       help="a loss seven robust deviations over the median of the steps before: say so, or also go "
                            "back after several")
    group.add_argument("--hang-timeout-minutes", type=float, metavar="M",
                       help="when no rank gets on for so long, write all stacks, name the silent rank and end")
    add_curves(group)
    group.add_argument("--verbose", action="store_true",
                       help="print Megatron's own output too (default: to a file in --save or --tensorboard-dir)")
    for action in parser._actions:
        if action.dest == "finetune":
            action.help = ("begin a new run from the weights of --pretrained-checkpoint, with HRM-Text's settings for "
                           "fine-tuning where no flag gives others; given again, go on with it from --save")
        if action.dest == "optimizer":
            action.choices = [OPTIMIZER, *(action.choices or ())]
        if action.dest == "transformer_impl":
            action.choices = [*TRANSFORMER_IMPLS]
    parser.set_defaults(**DEFAULTS | FORCED)
    return parser


def checked(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our group, and check the command line flag by flag: Megatron has a traceback, or nothing, where we refuse."""
    cuda = torch.cuda.is_available()
    check_flags(prepare(add_hrm_arguments(parser)), sys.argv[1:], cuda, {} if cuda else WITHOUT_CUDA)
    return parser


def fill_from_preset(args: argparse.Namespace) -> None:
    """Give every size that was not named on the command line the preset's value, or its usual one."""
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
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length


def layout_of(args: argparse.Namespace) -> Layout:
    """Read the layout off the arguments."""
    return Layout(args.world_size, args.tensor_model_parallel_size, args.pipeline_model_parallel_size,
                  args.context_parallel_size, args.sequence_parallel, args.seq_length, args.micro_batch_size,
                  args.global_batch_size)


def set_pipeline(args: argparse.Namespace, architecture: Architecture) -> None:
    """Make every tick a virtual chunk, and share the layers; Megatron's flags for the first and last stage win."""
    check_pipeline(layout_of(args), args.pipeline_window)
    if architecture.num_ticks == 1 and args.pipeline_window:
        raise ConfigError(f"--pipeline-window {args.pipeline_window}: has no effect on a {architecture.kind.title}, "
                          "whose single tick has no second phase; leave it out")
    if architecture.num_ticks > 1:
        args.num_virtual_stages_per_pipeline_rank = architecture.num_ticks
    if args.decoder_first_pipeline_num_layers is None and args.decoder_last_pipeline_num_layers is None:
        layers = cut_layers(architecture, args.pipeline_model_parallel_size, args.bp_max_steps)
        args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers = layers[0], layers[-1]


def set_dry_run(args: argparse.Namespace) -> None:
    """Take the ranks of the dry run for those of the run."""
    if (ranks := args.dry_run_ranks) is not None:
        args.world_size = ranks
    if not 1 <= args.world_size <= MOST_DRY_RANKS:
        raise ConfigError(f"--dry-run-ranks {args.world_size}: choose 1 to {MOST_DRY_RANKS}")
    if args.dry_run_rank is not None and not 0 <= args.dry_run_rank < args.world_size:
        raise ConfigError(f"--dry-run-rank {args.dry_run_rank}: choose 0 to {args.world_size - 1}")


def no_rows(args: argparse.Namespace) -> int:
    """Stand in for the count of rows where no data is open."""
    raise ConfigError(f"--epochs {args.epochs}: there is no data to count; give some, or --train-iters")


def parse_arguments(vocab_size_of: Any,
                    rows_of_epoch: Callable[[argparse.Namespace], int] = no_rows) -> argparse.Namespace:
    """Parse, complete and check the command line.

    `vocab_size_of(args)` reads the vocabulary's size from the data, `rows_of_epoch(args)` counts its rows.
    Raises ConfigError with one line for everything that can be said before a process group exists.
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
    """Complete and check what was parsed, see `parse_arguments`."""
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
    # Padded for the reference's sake and not per tensor-parallel size, so that any layout loads any checkpoint.
    args.padded_vocab_size = architecture.padded_vocab_size
    settle_epochs(args, rows_of_epoch)
    check_division(architecture, layout_of(args))
    check_batch(args)
    check_memory(args, machine)
    choose_fsdp(args, architecture)
    for bp_steps in (args.bp_min_steps, args.bp_max_steps):
        ticks_of(architecture, bp_steps)  # refuses impossible ones
    if args.pipeline_model_parallel_size > 1:
        set_pipeline(args, architecture)
    args.plan_version = PLAN_VERSION  # a checkpoint says which order its rows have
    args.optimizer = "adam"  # Megatron's name of the slot; optim.builder puts AdamATan2 into it
    try:
        megatron_arguments.validate_args(args)
    except AssertionError as error:
        reason = str(error) or f"Megatron demands `{traceback.extract_tb(error.__traceback__)[-1].line}`"
        raise ConfigError(f"command line: {reason}") from error
    explain_kernel(args.attention_kernel, args.params_dtype, architecture.head_dim)  # refuse an impossible one now
    if args.train_iters is None and args.train_samples:
        args.train_iters = args.train_samples // args.global_batch_size
    refuse_beside("--override-opt-param-scheduler", {
        "--use-checkpoint-opt-param-scheduler": args.override_opt_param_scheduler
        and args.use_checkpoint_opt_param_scheduler})
    check_policy(args)
    check_ablations(args)
    check_curves(args)
    if args.skip_train:
        args.train_iters = args.train_iters or 0
        args.gradient_accumulation_fusion = False  # there is no DDP, which would make the gradients' buffers
        return args
    if not args.train_iters:
        raise ConfigError("--train-iters (or --epochs, --train-samples) is not set: say how long to train")
    bp_schedule(args), lr_schedule(args)  # refuse impossible schedules now
    return args


def settle_epochs(args: argparse.Namespace, rows_of_epoch: Callable[[argparse.Namespace], int]) -> None:
    """Turn --epochs into steps of whole batches, by the rows of the first epoch."""
    if args.epochs is None:
        return
    refuse_beside(f"--epochs {args.epochs}", {"--train-iters": args.train_iters, "--train-samples": args.train_samples,
                                              "--skip-train": args.skip_train})
    if not args.global_batch_size:
        raise ConfigError(f"--epochs {args.epochs}: --global-batch-size is not set: say how many rows a step has")
    args.train_iters = math.ceil(args.epochs * rows_of_epoch(args) / args.global_batch_size)


def given_by_hand(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that stand on the command line."""
    parser = add_hrm_arguments(megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return {action.dest: getattr(args, action.dest) for _, action in given(parser, sys.argv[1:])}


def microbatches_of(args: argparse.Namespace) -> int:
    """Micro-batches of a step on each replica."""
    return int(args.global_batch_size // (args.micro_batch_size * args.data_parallel_size))


def model_config(args: argparse.Namespace) -> HRMConfig:
    """Build the TransformerConfig of a run."""
    # Megatron would demand that the chunks divide the layers; here each chunk runs all of its stage's.
    config: HRMConfig = core_transformer_config_from_args(
        argparse.Namespace(**{**vars(args), "virtual_pipeline_model_parallel_size": None}), HRMConfig)
    architecture = architecture_of(args, args.vocab_size)
    own: dict[str, Any] = dict(architecture=architecture, attention_output_gate=architecture.gated,
                               **swiglu_settings(args.compile_layers or args.recompute_gated_act))
    config = dataclasses.replace(config, **own)
    if args.virtual_pipeline_model_parallel_size:
        config.virtual_pipeline_model_parallel_size = args.virtual_pipeline_model_parallel_size
        config.microbatch_group_size_per_vp_stage = microbatch_group(microbatches_of(args),
                                                                     args.pipeline_model_parallel_size)
    return config
