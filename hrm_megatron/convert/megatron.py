"""Read a checkpoint of hrm_megatron.pretrain, without a process group."""
from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hrm_megatron.checkpoint.folders import not_of_an_hrm, read_run
from hrm_megatron.checkpoint.fsdp_folder import open_run
from hrm_megatron.checkpoint.verify import UNVERIFIED, check_around_tensors
from hrm_megatron.convert.adapters import Adapters
from hrm_megatron.convert.casts import as_start
from hrm_megatron.convert.checkpoint import EMA, PARTS, RAW, TOKENS_KNOWN, Checkpoint, Origin, Training
from hrm_megatron.convert.ledger import origin_of
from hrm_megatron.convert.table import Rename, check, table
from hrm_megatron.optim.adam_atan2 import UPDATES, state_key
from hrm_megatron.optim.schedule import lr_steps_of
from hrm_megatron.optim.sharded import EMBEDDING
from hrm_megatron.training.lora import lora_of
from hrm_megatron.training.resume import context_of

STATE_NAMES = {RAW: "param", **{part: part for part in PARTS if part != RAW}}  # Megatron calls fp32 masters "param"


def read_megatron(path: str | Path, verify: bool = True) -> Checkpoint:
    """Open the folder of one iteration (see `find_iteration`), saved under any parallel layout.

    Adapters are merged into the weights that they change; only merged weights can be read of such a checkpoint. Tensors
    are verified when they are read, everything else at once; raises DamagedError.
    """
    path = Path(path)
    stored = open_run(path, verify)
    remark = check_around_tensors(stored) if verify else UNVERIFIED
    common, architecture = read_run(stored)
    try:
        training, iteration = _training_of(common["args"], common), int(common["iteration"])
        # Older conversions did not record it; they have no consumed samples, which every run has.
        counts_tokens = bool(getattr(common["args"], TOKENS_KNOWN, common["args"].consumed_train_samples))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise not_of_an_hrm(path, error) from error
    vocabulary = getattr(common["args"], "vocabulary", None)
    entries, lora = table(architecture), lora_of(common["args"])
    adapters = Adapters(lora) if lora else None
    factors = [*adapters.factors(entries)] if adapters else []
    shapes = stored.shapes()
    check(path, "megatron", [*entries, *factors],
          {key: shape for key, shape in shapes.items() if not key.startswith("optimizer.")})
    trained = factors or [entry for entry in entries if entry.trained]
    parts = {part for part, name in STATE_NAMES.items()
             if all(state_key(name, entry.megatron) in shapes for entry in trained)}
    stateful = {entry.megatron for entry in trained} if RAW in parts else set()
    groups = common.get("optimizer", {}).get("optimizer", {}).get("param_groups", [])
    embedding_updates = next((int(group[UPDATES]) for group in groups if group.get(EMBEDDING)), 0)

    def read(part: str, entry: Rename) -> torch.Tensor:
        plain = not entry.trained or (part == RAW and entry.megatron not in stateful)
        tensor = stored.tensor(entry.megatron if plain else state_key(STATE_NAMES[part], entry.megatron))
        return tensor.float() if entry.trained else as_start(f"{path}: {entry.megatron}", tensor)

    if adapters:
        return Checkpoint(path, architecture, training, iteration, 0, frozenset({RAW} | parts & {EMA}),
                          partial(adapters.merged, read), remark=remark, vocabulary=vocabulary, merged=True,
                          counts_tokens=counts_tokens)
    origin = None
    if not iteration:  # a run that trains on in this folder has later iterations of its own
        origin = origin_of(path.parent, verify) or (None if parts.issuperset(PARTS) else Origin(None, 0))
    return Checkpoint(path, architecture, training, iteration, embedding_updates, frozenset({RAW} | parts), read,
                      remark=remark, vocabulary=vocabulary, origin=origin, counts_tokens=counts_tokens)


def _training_of(args: argparse.Namespace, common: dict[str, Any]) -> Training:
    groups = common.get("optimizer", {}).get("optimizer", {}).get("param_groups", [])
    warmup_steps, total_steps = lr_steps_of(args)
    context = context_of(args)
    return Training(
        seq_length=context, row_tokens=None if args.seq_length == context else args.seq_length,
        tokens_per_step=args.seq_length * args.global_batch_size, total_steps=total_steps,
        lr=args.lr, min_lr=args.min_lr, last_lr=float(groups[0]["lr"]) if groups else 0.0, warmup_steps=warmup_steps,
        weight_decay=args.weight_decay, beta1=args.adam_beta1, beta2=args.adam_beta2, ema_decay=args.ema_decay,
        bp_min_steps=args.bp_min_steps, bp_max_steps=args.bp_max_steps, bp_warmup_fraction=args.bp_warmup_fraction,
        seed=args.seed,
        **{name: getattr(args, name, False) for name in ("loss_on_prefix", "adamw")})  # older versions stored none
