"""`--match-flops-of`: train as many steps as have the FLOPs of a preset's HRM in --train-iters steps."""
from __future__ import annotations

import argparse

from hrm_megatron.config import CAUSAL, PRESETS, ConfigError
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.model_types import HRM, MODEL_TYPES
from hrm_megatron.planner.match_flops import Recipe, matched_steps, run_flops
from hrm_megatron.training.data import Sources, first_rows, plan_folder
from hrm_megatron.training.lora import lora_of
from hrm_megatron.training.step_schedules import bp_schedule, lr_schedule
from hrm_megatron.transformer_config import architecture_of


def match_flops(args: argparse.Namespace, data: Sources | None) -> list[str]:
    """Set the number of steps if the flag was given; return lines for the log."""
    if (preset := args.match_flops_of) is None:
        return []
    flag = f"--match-flops-of {preset}"
    if args.skip_train:
        raise ConfigError(f"{flag}: is incompatible with --skip-train, which trains no steps: leave one of them out")
    if data is None:
        raise ConfigError(f"{flag}: FLOPs depend on the lengths of examples; give the data too (--data-path)")
    first = PackedRows(data.train, args.seq_length, args.seed, args.global_batch_size,
                       cache_folder=plan_folder(args, data.train), causal=args.attention_mask == CAUSAL,
                       loss_on_prefix=args.loss_on_prefix)
    hrm = Recipe(PRESETS[preset].architecture(args.vocab_size), (*MODEL_TYPES[HRM].bp_steps, args.bp_warmup_fraction))
    ours = Recipe(architecture_of(args, args.vocab_size),
                  (args.bp_min_steps, args.bp_max_steps, args.bp_warmup_fraction), lora_of(args))
    asked, size = args.train_iters, (args.seq_length, args.global_batch_size, *first_rows(first))
    budget = run_flops(hrm, asked, *size)
    args.train_iters = matched_steps(ours, budget, *size)
    bp_schedule(args), lr_schedule(args)  # refuse schedules that do not fit the new length
    cost = run_flops(ours, args.train_iters, *size)
    return [f"flops: an HRM of {preset} takes {budget:.4g} for {asked} steps; this {ours.architecture.kind.title} "
            f"{cost:.4g} ({cost / budget - 1:+.2%}) for {args.train_iters}"]
