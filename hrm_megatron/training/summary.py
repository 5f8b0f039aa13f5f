"""Start-up summary apart from the layout: model, checkpoint to resume from, training schedule."""
from __future__ import annotations

import argparse

from megatron.training.checkpointing import get_loaded_iteration

from hrm_megatron.model.ticks import ticks_of
from hrm_megatron.optim.schedule import BPSchedule
from hrm_megatron.training.early_stopping import stopped_early
from hrm_megatron.training.lora import describe_lora
from hrm_megatron.training.resume import nothing_left
from hrm_megatron.training.step_schedules import lr_schedule
from hrm_megatron.transformer_config import architecture_of


def describe_model(args: argparse.Namespace) -> str:
    a = architecture_of(args, args.vocab_size)
    return (f"model: {a.kind.title} of {a.num_parameters / 1e6:,.2f} M parameters: {len(a.kind.stacks)} "
            f"stack{'s' * (len(a.kind.stacks) > 1)} of {a.num_layers} layers, hidden "
            f"{a.hidden_size}, {a.num_attention_heads} heads, FFN {a.ffn_hidden_size}, vocabulary {a.vocab_size} "
            f"(padded to {a.padded_vocab_size}); ticks {' '.join(tick.stack for tick in ticks_of(a))}; "
            f"{str(args.params_dtype).removeprefix('torch.')}{f', FP8 {args.fp8_recipe}' if args.fp8 else ''}"
            f"{describe_lora(args, a)}")


def only_evaluates(args: argparse.Namespace) -> bool:
    """Tell whether no step is left, so that the run only performs a missing final evaluation."""
    return not args.skip_train and bool(nothing_left(args.iteration, args.train_iters)
                                        or stopped_early(args, args.iteration))


def describe_checkpoint(args: argparse.Namespace) -> str:
    """Return one line about the loaded checkpoint and where the run saves; call it after loading."""
    if args.skip_train:
        return f"checkpoint: step {args.iteration} of {args.load} is evaluated; nothing is saved"
    if (loaded := get_loaded_iteration()) is None or loaded < 0:
        start = "new weights"
    elif args.iteration:
        start = f"goes on after step {args.iteration}, loaded from {args.load}"
    else:
        start = f"weights of {args.pretrained_checkpoint or args.load}, a new run"
    if only_evaluates(args):
        return f"checkpoint: {start}; no step is left, and nothing is saved"
    if not args.save:
        return f"checkpoint: {start}; nothing is saved (--save DIR)"
    every = f"every {args.save_interval} steps and " if args.save_interval else ""
    return f"checkpoint: {start}; saves {every}at the end to {args.save}"


def describe_schedule(args: argparse.Namespace, bp: BPSchedule) -> str:
    lr = lr_schedule(args)
    decay = "constant" if lr.min_lr == lr.lr else f"cosine to {lr.min_lr:g} at step {lr.total_steps}"
    tokens, first = args.global_batch_size * args.seq_length, args.iteration + 1
    here = f", {lr.at(first):g} at step {first}" if args.iteration else ""
    return (f"schedule: steps {first} to {args.train_iters} of {tokens:,} tokens; lr {lr.lr:g} after "
            f"{lr.warmup_steps} steps of warm-up, {decay}{here}; bp_steps {bp.at(first)} to {bp.at(args.train_iters)}; "
            f"EMA decay {args.ema_decay:g}")
