"""Write a torch_dist checkpoint that `hrm_megatron.pretrain --load` resumes from."""
from __future__ import annotations

import argparse
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject

from hrm_megatron.checkpoint.folders import DCP_CONFIG_FILE
from hrm_megatron.checkpoint.fsdp_folder import COMMON
from hrm_megatron.checkpoint.iterations import folder_name
from hrm_megatron.checkpoint.manifest import TRACKER_FILE, describe_folder, write_manifest
from hrm_megatron.checkpoint.stream import LazyTensor, save_lazily
from hrm_megatron.checkpoint.verify import FORMAT
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.checkpoint import RAW, TOKENS_KNOWN, Checkpoint
from hrm_megatron.convert.ledger import Ledger
from hrm_megatron.convert.megatron import STATE_NAMES
from hrm_megatron.convert.table import Rename, table
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.optim.adam_atan2 import UPDATES, state_key
from hrm_megatron.optim.builder import STEPS_DONE
from hrm_megatron.optim.sharded import BY_NAME, EMBEDDING
from hrm_megatron.parallel.single import single_rank
from hrm_megatron.training.arguments import fill_from_preset
from hrm_megatron.training.own_flags import FORCED, full_parser
from hrm_megatron.transformer_config import hrm_config

# `--dist-ckpt-optim-fully-reshardable`: optimizer state keyed by weight names, for any parallel layout.
SHARDING = dict(BY_NAME, singleton_local_shards=False, chained_optim_avoid_prefix=True)


def _arguments_for(checkpoint: Checkpoint) -> argparse.Namespace:
    """Return the arguments of a run that could have written this checkpoint."""
    a, t = checkpoint.architecture, checkpoint.training
    row_tokens = t.row_tokens or t.seq_length
    if a.h_norm_placement not in (None, a.norm_placement):
        raise ConfigError(f"{checkpoint.path}: the H stack alone has {a.h_norm_placement}-norm layers, for which "
                          "hrm_megatron.pretrain has no flag; save as native")
    flags = {
        "num-layers": a.num_layers, "hidden-size": a.hidden_size, "num-attention-heads": a.num_attention_heads,
        "ffn-hidden-size": a.ffn_hidden_size, "model-type": a.model_type, "h-cycles": a.h_cycles,
        "l-cycles": a.l_cycles,
        "norm-placement": a.norm_placement, "attention-mask": a.attention_mask,
        "attention-gate": a.attention_gate, "init-scheme": a.init_scheme,
        "init-std": a.init_std,
        "norm-epsilon": a.norm_epsilon, "seq-length": row_tokens,
        "global-batch-size": max(1, t.tokens_per_step // row_tokens), "lr": t.lr, "min-lr": t.min_lr,
        "lr-warmup-iters": t.warmup_steps, "train-iters": t.total_steps, "weight-decay": t.weight_decay,
        "adam-beta1": t.beta1, "adam-beta2": t.beta2, "ema-decay": t.ema_decay, "bp-min-steps": t.bp_min_steps,
        "bp-max-steps": t.bp_max_steps, "bp-warmup-fraction": t.bp_warmup_fraction, "seed": t.seed,
    }
    args = full_parser().parse_args([f"--{name}={value}" for name, value in flags.items() if value is not None])
    fill_from_preset(args)
    values = dict(
        FORCED, rotary_base=a.rope_theta, vocab_size=a.vocab_size, padded_vocab_size=a.padded_vocab_size, rank=0,
        world_size=1, data_parallel_size=1, loss_on_prefix=t.loss_on_prefix, adamw=t.adamw,
        vocabulary=checkpoint.vocabulary, context_tokens=t.seq_length,
        no_save_rng=True,  # no RNG state is stored; without this Megatron looks for it
        # Megatron replaces a count of 0 by iteration * rows per step of the run that resumes.
        consumed_train_samples=0, skipped_train_samples=0, consumed_valid_samples=0)
    for name, value in values.items():
        setattr(args, name, value)
    setattr(args, TOKENS_KNOWN, checkpoint.tokens_known)
    return args


def write_megatron(checkpoint: Checkpoint, folder: Path, ledger: Ledger | None = None) -> None:
    """Write a folder that `hrm_megatron.pretrain --load` resumes from, in any layout and with any schedule.

    From a checkpoint without optimizer state it is a weights-only folder, to train from with --finetune. One tensor is
    in memory at a time; `ledger` records them.
    """
    ledger, args = ledger or Ledger(), _arguments_for(checkpoint)
    target = folder / folder_name(checkpoint.iteration)
    target.mkdir(parents=True)
    common: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": checkpoint.iteration,
                              "opt_param_scheduler": {STEPS_DONE: checkpoint.iteration},
                              "num_floating_point_operations_so_far": 0.0, "content_metadata": dict(SHARDING)}
    state: dict[str, LazyTensor | io.BytesIO] = dict(_extra_states(checkpoint.architecture))
    for entry in table(checkpoint.architecture):
        state[entry.megatron] = ledger.noting(entry.megatron, _stored(checkpoint, RAW, entry))
    if checkpoint.has_state:
        common["optimizer"] = {"optimizer": {"param_groups": _groups(checkpoint)},
                               "param_state_sharding_type": SHARDING["distrib_optim_sharding_type"]}
        for entry in table(checkpoint.architecture):
            for part, name in STATE_NAMES.items() if entry.trained else ():
                key = state_key(name, entry.megatron)
                state[key] = ledger.noting(key, _stored(checkpoint, part, entry))
    args.no_save_optim = not checkpoint.has_state
    state[COMMON] = _saved([common])
    save_lazily(state, target, flatten=False)
    (target / DCP_CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(FORMAT)))
    (folder / TRACKER_FILE).write_text(str(checkpoint.iteration))
    read_back = dataclasses.replace(checkpoint.architecture, h_norm_placement=None)  # there is no flag for it
    write_manifest(target, checkpoint.iteration, dataclasses.asdict(read_back), describe_folder(target))


def stock_state(model: HRMModel) -> dict[str, Any]:
    """Return Megatron's sharded state dict of the model, in a single rank."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    stored: dict[str, Any] = model.sharded_state_dict(metadata=dict(SHARDING, dp_cp_group=group))
    return stored


def _stored(checkpoint: Checkpoint, part: str, entry: Rename) -> LazyTensor:
    if not entry.trained:
        return LazyTensor(entry.shape, torch.bfloat16, lambda: checkpoint.read(RAW, entry))
    return LazyTensor(entry.shape, torch.float32, lambda: checkpoint.state(part, entry))


def _extra_states(architecture: Architecture) -> dict[str, io.BytesIO]:
    """Return what stock layers store beside tensors, by key, taken from an equally deep model of minimal width."""
    heads = architecture.num_attention_heads
    narrow = dataclasses.replace(architecture, hidden_size=2 * heads, ffn_hidden_size=1, vocab_size=1)
    with single_rank():
        stored = stock_state(HRMModel(hrm_config(narrow), seed=0))
    return {value.unique_key: _saved([value.data]) for value in stored.values()
            if isinstance(value, ShardedObject)}


def _saved(value: object) -> io.BytesIO:
    """Serialize a value as Megatron does; for objects it stores the list of shards in this rank."""
    stored = io.BytesIO()
    torch.save(value, stored)
    return stored


def _groups(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the two parameter groups as Megatron's optimizer describes them; a run reads only the counts from them."""
    t = checkpoint.training
    common = dict(is_expert_parallel=False, wd_mult=1.0, lr_mult=1.0, max_lr=t.lr, min_lr=t.min_lr, lr=t.last_lr,
                  betas=(t.beta1, t.beta2), weight_decay=t.weight_decay, ema_decay=t.ema_decay)
    return [{**common, "default_config": True, "is_decoupled_lr": False, UPDATES: checkpoint.iteration},
            {**common, "default_config": False, "is_decoupled_lr": True, EMBEDDING: True,
             UPDATES: checkpoint.embedding_updates}]
