"""`--lora-rank`: fine-tune LoRA adapters with all weights of the model frozen (model/lora.py)."""
from __future__ import annotations

import argparse
from pathlib import Path

from hrm_megatron.config import LORA_TARGETS, Architecture, ConfigError, LoRA, refuse_beside
from hrm_megatron.planner.goodput import SAVED_BYTES
from hrm_megatron.planner.layout import weight_bytes
from hrm_megatron.training.conversion_command import by_converting
from hrm_megatron.training.hardware import LOCAL, TRANSFORMER_ENGINE

RANK, ALPHA, TARGETS = "--lora-rank", "--lora-alpha", "--lora-target-modules"


def add_lora(group: argparse._ArgumentGroup) -> None:
    group.add_argument(RANK, type=int, metavar="R",
                       help="--finetune adapters of rank R on the shared weights of the stacks, all else frozen (LoRA)")
    group.add_argument(ALPHA, type=float, metavar="A", help="adapters are scaled by A / R (default: R)")
    group.add_argument(TARGETS, nargs="+", choices=LORA_TARGETS, help="linear layers with an adapter (default: all)")


def lora_of(args: argparse.Namespace) -> LoRA | None:
    """Return the adapters that arguments describe, those of a run or of a checkpoint (older ones lack the flags)."""
    rank = getattr(args, "lora_rank", None)
    if not rank:
        return None
    targets = args.lora_target_modules or LORA_TARGETS
    return LoRA(rank, rank if args.lora_alpha is None else args.lora_alpha,
                tuple(target for target in LORA_TARGETS if target in targets))


def settle_lora(args: argparse.Namespace) -> None:
    """Refuse flags that adapters are incompatible with, and choose Megatron's local layers for them."""
    if args.lora_rank is None:
        for flag, given in ((ALPHA, args.lora_alpha), (TARGETS, args.lora_target_modules)):
            if given is not None:
                raise ConfigError(f"{flag}: has no effect without {RANK}; give that too, or leave it out")
        return
    flag = f"{RANK} {args.lora_rank}"
    if args.skip_train:
        raise ConfigError(f"{flag}: --skip-train evaluates merged weights, which have no adapters; leave {RANK} out")
    if not args.finetune:
        raise ConfigError(f"{flag}: adapters change a trained model; give --finetune and --pretrained-checkpoint too, "
                          f"or leave {RANK} out")
    if not 1 <= args.lora_rank <= args.hidden_size:
        raise ConfigError(f"{flag}: must lie between 1 and the hidden size, {args.hidden_size}, from which on it spans "
                          "every change of the weights")
    if args.lora_alpha is not None and not 0 < args.lora_alpha < float("inf"):
        raise ConfigError(f"{ALPHA} {args.lora_alpha}: must be a positive number")
    refuse_beside(flag, {
        "--finetune-from state (its moments are of the weights)": args.finetune_from == "state",
        "--use-torch-fsdp2": args.use_torch_fsdp2, "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--fp8-format": args.fp8, "--compile-layers": args.compile_layers,
        f"--transformer-impl {TRANSFORMER_ENGINE}": args.transformer_impl == TRANSFORMER_ENGINE})
    args.transformer_impl = LOCAL


def check_adapters(folder: Path, theirs: LoRA | None, ours: LoRA | None, begins: bool) -> None:
    """Refuse to resume with different adapters, or to begin from weights with unmerged adapters."""
    if begins and theirs:
        raise ConfigError(f"{folder}: holds adapters ({RANK} {theirs.rank}) beside the weights that they change; merge "
                          f"them, {by_converting(folder, 'merged')}")
    if not begins and theirs != ours:
        raise ConfigError(f"{folder}: trained with {_flags(theirs)}, the command line has {_flags(ours)}; give the same"
                          ", or another --save")


def _flags(lora: LoRA | None) -> str:
    if lora is None:
        return f"no {RANK}"
    return f"{RANK} {lora.rank} {ALPHA} {lora.alpha:g} {TARGETS} {' '.join(lora.targets)}"


def saved_bytes(args: argparse.Namespace, architecture: Architecture) -> int:
    """Return the bytes of a checkpoint: all weights and adapters, and the optimizer state of the trained ones."""
    lora, total, state_bytes = lora_of(args), architecture.num_parameters, 0 if args.no_save_optim else SAVED_BYTES
    adapters = lora.num_parameters(architecture) if lora else 0
    return (total + adapters) * int(args.params_dtype.itemsize) + (adapters if lora else total) * state_bytes


def describe_lora(args: argparse.Namespace, architecture: Architecture) -> str:
    """Return the part of the model's description about adapters and what they save; "" if all weights train."""
    if (lora := lora_of(args)) is None:
        return ""
    trained, total = lora.num_parameters(architecture), architecture.num_parameters
    each = weight_bytes(args.params_dtype.itemsize, 1)
    saved = (total - trained) * (each.total - each.weights) - trained * each.weights
    return (f"; adapters of rank {lora.rank}, scaled by {lora.scale:g}, on {', '.join(lora.targets)}: "
            f"{trained / 1e6:,.2f} M weights train ({trained / total:.1%}), all others are frozen, which saves "
            f"{saved / 1e9:,.2f} GB of gradients and optimizer state in each replica")
