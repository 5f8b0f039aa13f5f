"""`--finetune`: a new run from the weights of another, with HRM-Text's fine-tuning settings.

The first start loads --pretrained-checkpoint and begins at step 0, with its own schedule and data; later starts resume
from the run's own checkpoints in --save.
"""
from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.num_microbatches_calculator import update_num_microbatches
from megatron.core.utils import unwrap_model
from megatron.training import training as megatron_training

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.checkpoint.iterations import RELEASE, iteration_of
from hrm_megatron.config import ConfigError, refuse_beside
from hrm_megatron.model.lora import without_adapters
from hrm_megatron.optim.adam_atan2 import state_key, state_prefix
from hrm_megatron.parallel.patching import temporarily
from hrm_megatron.program import followed
from hrm_megatron.training.conversion_command import by_converting
from hrm_megatron.training.lora import lora_of

log = logging.getLogger(__name__)

# HRM-Text's settings for supervised fine-tuning. Explicit flags win.
TOKENS_PER_STEP = 32_768
EPOCHS = 5
SETTINGS: dict[str, Any] = dict(lr=3e-5, bp_warmup_fraction=0.0, ema_decay=0.999)  # and no LR warm-up
MIN_LR_RATIO = 0.1
HOW_LONG = ("epochs", "train_iters", "train_samples")

EMA, RAW, STATE = "ema", "raw", "state"
SOURCES = (EMA, RAW, STATE)
OF_STATE = ("exp_avg", "exp_avg_sq", EMA, "param")


def settle_folders(args: argparse.Namespace) -> None:
    """Set --pretrained-checkpoint to the checkpoint to fine-tune and --load to --save, from which the run resumes.

    A --load that names the folder of --save in other words, as with a slash at its end, gets the words of --save.
    """
    if args.load and args.save and followed(Path(args.load)) == followed(Path(args.save)):
        args.load = args.save
    if not args.finetune:
        if args.finetune_from:
            raise ConfigError(f"--finetune-from {args.finetune_from}: has no effect without --finetune; give that too, "
                              "or leave it out")
        return
    if args.skip_train:
        raise ConfigError("--finetune is incompatible with --skip-train: of what it has saved, "
                          f"{how_to_evaluate(args)}")
    refuse_beside("--finetune", {"--print-config": args.print_config, "--no-load-optim": args.no_load_optim})
    if args.pretrained_checkpoint is None:
        if args.load is None:
            raise ConfigError("--finetune: from what? give --pretrained-checkpoint DIR")
        args.pretrained_checkpoint, args.load = args.load, None
    if args.save and followed(Path(args.save)) == followed(Path(args.pretrained_checkpoint)):
        raise ConfigError(f"--finetune: --save {args.save} is the folder that it begins from, whose checkpoints would "
                          "be overwritten; choose another --save")
    if args.load is not None and args.load != args.save:
        raise ConfigError(f"--finetune: it begins from --pretrained-checkpoint {args.pretrained_checkpoint} and goes "
                          f"on from --save {args.save}; leave --load {args.load} out")
    args.load = args.save


def fill_settings(args: argparse.Namespace, given: Collection[str]) -> None:
    """Set every fine-tuning setting that was not `given` on the command line to HRM-Text's value."""
    for name, value in SETTINGS.items():
        if name not in given:
            setattr(args, name, value)
    if args.min_lr is None:
        args.min_lr = MIN_LR_RATIO * args.lr
    if not any(getattr(args, name) for name in HOW_LONG):
        args.epochs = EPOCHS
    if args.global_batch_size is None and args.seq_length:
        if TOKENS_PER_STEP % args.seq_length:
            raise ConfigError(f"--seq-length {args.seq_length} does not divide the {TOKENS_PER_STEP} tokens per step "
                              "of --finetune: give --global-batch-size (rows per step) by hand")
        args.global_batch_size = TOKENS_PER_STEP // args.seq_length
        args._is_global_batch_size_explicitly_specified = True


def how_to_evaluate(args: argparse.Namespace) -> str:
    """Say how to evaluate the checkpoints of this run."""
    if lora_of(args):
        return "tools/generate.py and tools/evaluate.py read adapters as they are, --skip-train wants them merged"
    if args.finetune or args.finetune_from:
        return f"--skip-train --use-checkpoint-args --load {args.save or 'DIR'} in place of --finetune evaluates it"
    return "--skip-train evaluates it"


def go_on(args: argparse.Namespace, folder: Path, stored: argparse.Namespace) -> None:
    """Set the arguments so that the run resumes from `folder`, which it saved with the arguments `stored`."""
    if stored.pretrained_checkpoint is None:
        raise ConfigError(f"--save {args.save}: holds {folder.name} of a run that was no fine-tuning; choose another "
                          "--save, or leave --finetune out to go on with it")
    began, asked = (Path(one.pretrained_checkpoint).resolve() for one in (stored, args))
    if began != asked:
        log.info(f"checkpoint: {folder} began from {began}; --pretrained-checkpoint {asked} is not read any more")
    if args.finetune_from not in (None, stored.finetune_from):
        log.info(f"checkpoint: {folder} began from {stored.finetune_from}; --finetune-from {args.finetune_from} has no "
                 "effect any more")
    args.finetune_from, args.finetune_step = stored.finetune_from, getattr(stored, "finetune_step", None)
    if args.ckpt_step not in (None, args.finetune_step):
        log.info(f"checkpoint: {folder}: --ckpt-step {args.ckpt_step} is an iteration to begin from, and has no effect "
                 f"any more; to go back to an older one of {folder.parent}, move the later ones elsewhere")
    args.finetune, args.ckpt_step = False, None


def choose_source(args: argparse.Namespace, folder: Path, keys: Collection[str]) -> None:
    """Decide what to load from `folder`, an iteration with these `keys`; by default the EMA, else the raw weights."""
    has = {part: _has(part, keys) for part in OF_STATE}
    missing = [part for part in {EMA: [EMA], STATE: OF_STATE}.get(args.finetune_from, []) if not has[part]]
    if missing:
        raise ConfigError(f"--finetune-from {args.finetune_from}: {folder} holds weights alone, no {missing[0]}; leave "
                          "it out to begin from those")
    source = args.finetune_from or (EMA if has[EMA] else RAW)
    if source == EMA and (args.use_torch_fsdp2 or args.use_megatron_fsdp):
        raise ConfigError(f"--finetune-from {EMA}: is not built under FSDP; give --finetune-from {RAW}, or convert "
                          f"it, {by_converting(folder, EMA, '--weights', EMA)}")
    args.finetune_from = source
    args.finetune_step = None if folder.name == RELEASE else iteration_of(folder.name)
    what = {EMA: "the EMA of its weights, a new optimizer",
            RAW: f"its {'raw ' if has[EMA] else ''}weights, a new optimizer",
            STATE: "its weights, EMA, moments and counts of updates"}[source]
    log.info(f"fine-tuning: begins from {folder}: {what}; steps and data begin at 0")


def remark_on_weights(folder: Path, keys: Collection[str]) -> None:
    """Log that a run without --finetune begins from raw weights, if the iteration also has the EMA that exports use."""
    if _has(EMA, keys):
        log.info(f"checkpoint: begins from {folder}: its raw weights, a new optimizer; from its EMA, which exports and "
                 "evaluations use, it begins with --finetune")


def _has(part: str, keys: Collection[str]) -> bool:
    return any(key.startswith(state_key(part, "")) for key in keys)


def install_finetune(args: argparse.Namespace) -> None:
    """Let Megatron's loop load what --finetune-from asks for at the first start; stock code loads raw weights only, and
    would look for adapters."""
    if not args.finetune or (args.finetune_from == RAW and not args.lora_rank):
        return
    stock: Callable[..., tuple[int, int]] = megatron_training.load_checkpoint

    @functools.wraps(stock)
    def load_weights(model: list[torch.nn.Module], optimizer: Any, *rest: Any, **options: Any) -> tuple[int, int]:
        with without_adapters(model):
            loaded = stock(model, optimizer, *rest, **options)
            if args.finetune_from == EMA:
                take_ema(model, find_iteration(args.pretrained_checkpoint, args.ckpt_step))
        if args.bf16 or args.fp16:
            optimizer.reload_model_params()
        return loaded

    @functools.wraps(stock)
    def load_state(*arguments: Any, **options: Any) -> tuple[int, int]:
        with temporarily(args, finetune=False, load=args.pretrained_checkpoint, pretrained_checkpoint=None,
                         no_load_rng=True):
            _, flops = stock(*arguments, **options)
        args.consumed_train_samples = args.skipped_train_samples = args.consumed_valid_samples = 0
        update_num_microbatches(consumed_samples=0)
        return 0, flops

    megatron_training.load_checkpoint = load_state if args.finetune_from == STATE else load_weights


@torch.no_grad()
def take_ema(model: list[torch.nn.Module], folder: Path) -> None:
    """Load the EMA of an iteration into the model's weights, in any layout."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted: dict[str, ShardedTensor | ShardedTensorFactory] = {}
    weights: dict[str, torch.Tensor] = {}
    for chunk in unwrap_model(model):
        for weight in nested_values(chunk.sharded_state_dict(metadata=dict(dp_cp_group=group))):
            if isinstance(weight, ShardedTensor | ShardedTensorFactory) and isinstance(weight.data, torch.nn.Parameter):
                fp32 = torch.empty_like(weight.data, dtype=torch.float32)
                wanted[weight.key] = make_sharded_optimizer_tensor(weight, fp32, state_prefix(EMA))
                weights[weight.key] = weight.data
    loaded: Mapping[str, torch.Tensor] = dist_checkpointing.load(wanted, str(folder))
    for key, weight in weights.items():
        weight.copy_(loaded[key])
