"""Our flags beside Megatron's, our defaults for Megatron's flags, and which arguments were given explicitly on the
command line."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.training import arguments as megatron_arguments

from hrm_megatron.attention.core import KERNELS
from hrm_megatron.attention.kernel_choice import AUTO
from hrm_megatron.config import INIT_SCHEMES, NORM_PLACEMENTS, PRESETS
from hrm_megatron.model_types import HRM, MODEL_TYPES, ModelType
from hrm_megatron.parallel.simulate import AUTO as AUTO_SCHEDULE
from hrm_megatron.parallel.simulate import SCHEDULES
from hrm_megatron.training.ablations import add_ablations
from hrm_megatron.training.bad_steps import ABORT, IGNORE, POLICIES, ROLLBACK_AFTER, SPIKE_POLICIES
from hrm_megatron.training.curve_flags import add_curves
from hrm_megatron.training.evaluation import EVAL_WEIGHTS, RAW
from hrm_megatron.training.finetune import SOURCES
from hrm_megatron.training.flags.check import check_flags, given
from hrm_megatron.training.flags.help import prepare
from hrm_megatron.training.hardware import TRANSFORMER_IMPLS
from hrm_megatron.training.lora import add_lora
from hrm_megatron.transformer_config import HRM_SETTINGS

OPTIMIZER = "adam_atan2"

# Our defaults for Megatron's flags; explicit flags win.
DEFAULTS: dict[str, Any] = dict(
    clip_grad=0.0, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95,  # HRM-Text, cfg_pretrain
    lr_decay_style="cosine", min_lr=None,
    optimizer=OPTIMIZER, tokenizer_type="NullTokenizer", position_embedding_type="rope",
    transformer_impl=None,  # decided by training.hardware
    layernorm_epsilon=1e-6,  # HRM-Text, norm_eps
    ckpt_format="torch_dist", use_distributed_optimizer=True, dist_ckpt_optim_fully_reshardable=True,
    ckpt_fully_parallel_load=True,  # data parallel ranks divide the reads; each byte is read once
    data_parallel_sharding_strategy="optim_grads_params", megatron_fsdp_main_grads_dtype="fp32",
    async_strategy="mcore",  # Megatron's default nvrx needs another package
    log_interval=10, eval_interval=1000, eval_iters=10, save_interval=1000, num_workers=2,
    split="97,3,0",  # 3 % for validation, no test set; Megatron's default is 969,30,1
)
# What makes the model an HRM; users cannot change it.
FORCED: dict[str, Any] = dict(
    swiglu=True, bias_swiglu_fusion=False, untie_embeddings_and_output_weights=True, calculate_per_token_loss=True,
    create_attention_mask_in_dataloader=False, group_query_attention=False, num_query_groups=None, **HRM_SETTINGS,
)
# Settings without CUDA; the fused kernels need CUDA, Apex or Transformer Engine.
WITHOUT_CUDA: dict[str, Any] = dict(
    distributed_backend="gloo", use_cpu_initialization=True, num_workers=0,
    masked_softmax_fusion=False, no_persist_layer_norm=True,
)


def default_of(kind: ModelType, name: str) -> int:
    """Return a model type's default for cycles or gradient ticks."""
    return dict(h_cycles=kind.h_cycles, l_cycles=kind.l_cycles, bp_min_steps=kind.bp_steps[0],
                bp_max_steps=kind.bp_steps[1])[name]


def by_type(name: str) -> str:
    """Return a help text with the default of a setting for each model type."""
    return "default: " + ", ".join(f"{default_of(kind, name)} {model_type}" for model_type, kind in MODEL_TYPES.items())


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hrm-preset", choices=[*PRESETS],
                       help="model sizes, learning rate, global and micro-batch size; explicit flags override them")
    group.add_argument("--print-config", action="store_true",
                       help="print all that --hrm-preset sets, where it comes from and its layouts, and exit")
    group.add_argument("--epochs", type=int, metavar="N",
                       help="train for so many passes over the data, in place of --train-iters")
    group.add_argument("--finetune-from", choices=SOURCES,
                       help="what --finetune takes of a checkpoint: the EMA or the raw weights, with a new optimizer, "
                            "or all of its state (default: the EMA if it has one)")


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
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


def _add_dry_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dry-run", action="store_true",
                       help="build the run without weights, print parameters, data plan, memory and space, and exit")
    group.add_argument("--dry-run-ranks", type=int, metavar="N",
                       help="ranks of the dry run, up to 1024 (default: those that were started)")
    group.add_argument("--dry-run-rank", type=int, metavar="R",
                       help="also print the shapes of all weights of this rank of the dry run")


def _add_model(group: argparse._ArgumentGroup) -> None:
    # Megatron already uses the name model_type.
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


def _add_execution(group: argparse._ArgumentGroup) -> None:
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


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sampled-data-path", metavar="DIR",
                       help="train on a `sampled` folder of HRM-Text's data pipeline")
    group.add_argument("--sampling-rules", metavar="FILE",
                       help="YAML list of rules: how many examples of each source file an epoch has")


def _add_survival(group: argparse._ArgumentGroup) -> None:
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


def add_hrm_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our group to Megatron's parser and set our defaults for its flags."""
    group = parser.add_argument_group("hrm")
    for add in (_add_run, _add_evaluation, _add_dry_run, _add_model, _add_execution, _add_data, add_lora, add_ablations,
                _add_survival, add_curves):
        add(group)
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
    """Add our group and check each flag on the command line; Megatron would end in a traceback, or ignore the error."""
    cuda = torch.cuda.is_available()
    check_flags(prepare(add_hrm_arguments(parser)), sys.argv[1:], cuda, {} if cuda else WITHOUT_CUDA)
    return parser


def full_parser() -> argparse.ArgumentParser:
    """Return the parser of a run, for use outside of a run."""
    return prepare(add_hrm_arguments(megatron_arguments.add_megatron_arguments(
        argparse.ArgumentParser("hrm_megatron.pretrain", allow_abbrev=False))))


def given_by_hand(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that were given explicitly on the command line."""
    return {action.dest: getattr(args, action.dest) for _, action in given(full_parser(), sys.argv[1:])}
