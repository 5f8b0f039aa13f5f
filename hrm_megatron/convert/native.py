"""HRM-Text's own checkpoint folder: fsdp2_epoch_N/, all_config.yaml, train_metadata.yaml and empty carries."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml

from hrm_megatron.checkpoint.archive import check_archive_file
from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.checkpoint.manifest import describe_folder, write_manifest
from hrm_megatron.checkpoint.stream import LazyTensor, save_lazily, write_archive
from hrm_megatron.checkpoint.verify import UNVERIFIED, check_around_tensors
from hrm_megatron.config import CAUSAL, PREFIX_LM, Architecture, ConfigError, ffn_hidden_size
from hrm_megatron.convert.casts import as_start
from hrm_megatron.convert.checkpoint import EMA, RAW, Checkpoint, Training
from hrm_megatron.convert.ledger import Ledger, origin_of
from hrm_megatron.convert.native_recurrence import read_recurrence, write_recurrence
from hrm_megatron.convert.setting import whole
from hrm_megatron.convert.table import Rename, check, is_embedding, table
from hrm_megatron.data.spelling import BOQ, EOA, EOQ, TAG_TOKENS
from hrm_megatron.data.tokenizer import vocabulary_beside
from hrm_megatron.optim.schedule import as_fp32

NATIVE_CONFIG_FILE, METADATA_FILE = "all_config.yaml", "train_metadata.yaml"
PART_NAMES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", EMA: "param_ema"}
# Settings that all supported networks share.
FIXED = {"head": "lm_head@LMHead", "pos_emb_type": "rope"}


def model_key(entry: Rename) -> str:
    return f"model.{entry.native}"


def state_key(entry: Rename, name: str) -> str:
    return f"optim.state.{entry.native}.{name}"


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read ({error.strerror}); HRM-Text writes it beside fsdp2_epoch_N") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())}); copy the checkpoint again") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds no settings; copy the checkpoint again")
    return loaded


def find_epoch(folder: Path, epoch: int | None = None) -> int:
    """Return the epoch to read: `epoch` if it exists, the latest one if it is None."""
    epochs = sorted(int(found[1]) for path in (folder.iterdir() if folder.is_dir() else ())
                    if (found := re.fullmatch(r"fsdp2_epoch_(\d+)", path.name)))
    if not epochs:
        raise ConfigError(f"{folder}: no fsdp2_epoch_N in it; give the folder that HRM-Text's checkpoint_path names")
    if epoch is not None and epoch not in epochs:
        raise ConfigError(f"{folder}: no fsdp2_epoch_{epoch}; choose --ckpt-step from {', '.join(map(str, epochs))}")
    return epochs[-1] if epoch is None else epoch


def _architecture(arch: dict[str, Any], vocab_size: int) -> Architecture:
    for name, value in FIXED.items():
        if arch.get(name) != value:
            raise ConfigError(f"arch.{name}: {arch.get(name)!r} is not the HRM that is built here ({value!r})")
    override = dict(arch.get("H_override") or {})
    h_norm_placement = override.pop("norm_type", None)
    if override:
        raise ConfigError(f"arch.H_override: {override}: only norm_type may differ in the H stack")
    recurrence = read_recurrence(arch)
    return Architecture(
        model_type=recurrence.model_type, num_layers=recurrence.num_layers,
        hidden_size=whole("arch.hidden_size", arch["hidden_size"]),
        num_attention_heads=whole("arch.num_heads", arch["num_heads"]), vocab_size=vocab_size,
        ffn_hidden_size=ffn_hidden_size(arch["hidden_size"], float(arch["expansion"])),
        h_cycles=recurrence.h_cycles, l_cycles=recurrence.l_cycles, norm_placement=arch["norm_type"],
        h_norm_placement=h_norm_placement, init_scheme=arch["init_type"], init_std=arch.get("init_std"),
        rope_theta=float(arch["rope_theta"]), norm_epsilon=float(arch["norm_eps"]),
        attention_mask=CAUSAL if arch.get("attn_type") == CAUSAL else PREFIX_LM)


def _training(config: dict[str, Any], metadata: dict[str, int], last_lr: float) -> Training:
    tokens, epochs, warmup_steps, seed = (whole(name, config[name]) for name in (
        "global_batch_size", "epochs", "lr_warmup_steps", "seed"))
    bp_min, bp_max, rise = read_recurrence(config["arch"]).bp
    return Training(
        seq_length=metadata["max_seq_len"], tokens_per_step=tokens,
        total_steps=max(1, epochs * metadata["total_length"] // tokens),
        lr=float(config["lr"]), min_lr=float(config["lr"]) * float(config["lr_min_ratio"]), last_lr=last_lr,
        warmup_steps=warmup_steps, weight_decay=float(config["weight_decay"]),
        beta1=float(config["beta1"]), beta2=float(config["beta2"]), ema_decay=float(config["ema"]),
        bp_min_steps=bp_min, bp_max_steps=bp_max, bp_warmup_fraction=rise, seed=seed,
        loss_on_prefix=not config["data"].get("target_only", True))


def read_native(folder: str | Path, epoch: int | None = None, verify: bool = True) -> Checkpoint:
    """Open a checkpoint of HRM-Text, written by any number of ranks; its optimizer steps are the iterations.

    Tensors are verified when they are read, everything else at once; raises DamagedError.
    """
    folder, epoch = Path(folder), find_epoch(Path(folder), epoch)
    stored = DCPFolder(folder / f"fsdp2_epoch_{epoch}", verify)
    remark = check_around_tensors(stored) if verify else UNVERIFIED
    for carry in sorted(folder.glob(f"carry_epoch_{epoch}.*.pt")) if verify else ():
        check_archive_file(carry)
    config, metadata = _load_yaml(folder / NATIVE_CONFIG_FILE), _load_yaml(folder / METADATA_FILE)
    shapes = stored.shapes()
    has_optimizer = any(key.startswith("optim.") for key in stored.keys())  # noqa: SIM118  # not a dict
    last_lr = float(stored.tensor("optim.param_groups.0.lr")) if has_optimizer else 0.0
    place = folder / METADATA_FILE
    try:
        counts = {name: whole(name, metadata[name]) for name in ("vocab_size", "max_seq_len", "total_length")}
        place = folder / NATIVE_CONFIG_FILE
        architecture = _architecture(config["arch"], counts["vocab_size"])
        training = _training(config, counts, last_lr)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{folder}: {NATIVE_CONFIG_FILE} or {METADATA_FILE} lacks a setting or has an odd one "
                          f"({error}); copy the checkpoint again") from error
    entries = table(architecture)
    check(stored.path, "native", entries, {key.removeprefix("model."): shape for key, shape in shapes.items()
                                           if key.startswith("model.")})
    trained = [entry for entry in entries if entry.trained]
    iteration, embedding_updates = _counts(stored, trained) if has_optimizer else (0, 0)
    for name in PART_NAMES.values() if has_optimizer else ():
        check(f"{stored.path}, {name}", "native", trained, {
            key.removeprefix("optim.state.").removesuffix(f".{name}"): shape for key, shape in shapes.items()
            if key.startswith("optim.state.") and key.endswith(f".{name}")})

    def read(part: str, entry: Rename) -> torch.Tensor:
        key = model_key(entry) if part == RAW else state_key(entry, PART_NAMES[part])
        tensor = stored.tensor(key)
        return entry.to_megatron(tensor if entry.trained else as_start(f"{stored.path}: {key}", tensor))

    return Checkpoint(folder, architecture, training, iteration, embedding_updates,
                      frozenset({RAW, *(PART_NAMES if has_optimizer else ())}), read, remark=remark,
                      vocabulary=vocabulary_beside(folder), origin=None if iteration else origin_of(folder, verify),
                      counts_tokens=False)


def _counts(stored: DCPFolder, trained: list[Rename]) -> tuple[int, int]:
    """Return the number of updates of the weights and of the embedding; all weights must agree."""
    steps = {entry.native: int(stored.tensor(state_key(entry, "step"))) for entry in trained}
    embedding = next(steps.pop(entry.native) for entry in trained if is_embedding(entry))
    if len(set(steps.values())) > 1:
        few, many = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        raise ConfigError(f"{stored.path}: {few} has had {steps[few]} updates and {many} {steps[many]}; only the "
                          "embedding may lag behind, so there is no step to go on from")
    return max(steps.values()), embedding


def _config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    a, t = checkpoint.architecture, checkpoint.training
    expansion: float = next((e for e in (4, *(n / 2 for n in range(2, 33)), 1.5 * a.ffn_hidden_size / a.hidden_size)
                             if ffn_hidden_size(a.hidden_size, e) == a.ffn_hidden_size), 0)
    if not expansion:
        raise ConfigError(f"{checkpoint.path}: ffn_hidden_size={a.ffn_hidden_size} is no multiple of 256; HRM-Text "
                          "cannot build it: save as hf or megatron")
    if t.adamw:
        raise ConfigError(f"{checkpoint.path}: trained with --adamw, and HRM-Text would go on with AdamATan2; save as "
                          "megatron, or its weights as hf")
    if not a.gated and checkpoint.iteration:
        raise ConfigError(f"{checkpoint.path}: trained with --attention-gate {a.attention_gate}, and HRM-Text would go "
                          "on with a gate; save as megatron, or give --weights ema: weights of a gate of 1/2, with "
                          "twice the output projections, are the same function")
    try:
        recurrence = write_recurrence(a, t)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.path}: {error}") from error
    arch = dict(
        FIXED, **recurrence, expansion=expansion, hidden_size=a.hidden_size, num_heads=a.num_attention_heads,
        norm_type=a.norm_placement, norm_eps=a.norm_epsilon, init_type=a.init_scheme, rope_theta=a.rope_theta)
    if "H" in a.kind.stacks:
        arch["H_override"] = {"norm_type": a.h_norm_placement} if a.h_norm_placement else {}
    if a.causal:
        arch["attn_type"] = CAUSAL
    if a.init_std is not None:
        arch["init_std"] = a.init_std
    return dict(
        arch=arch, beta1=t.beta1, beta2=t.beta2, checkpoint_interval=1, checkpoint_path="checkpoints",
        data=dict(path="sampled", target_only=not t.loss_on_prefix), ema=t.ema_decay, epochs=1,
        fwd_bwd_dtype="bfloat16",
        global_batch_size=t.tokens_per_step, log_interval=1, lr=t.lr, lr_min_ratio=t.min_lr / t.lr if t.lr else 1.0,
        lr_warmup_steps=t.warmup_steps, project_name="hrm_megatron", run_name="converted", resume_epoch=None,
        resume_from=None, seed=t.seed, weight_decay=t.weight_decay, weights_only_resume_from_ema=False)


def _metadata_of(checkpoint: Checkpoint) -> dict[str, Any]:
    t = checkpoint.training
    return dict(
        max_seq_len=t.seq_length, total_length=t.total_steps * t.tokens_per_step,
        vocab_size=checkpoint.architecture.padded_vocab_size, tokenizer_info=dict(
            boq=BOQ, eoq=EOQ, eoa=EOA, condition_mapping=dict(TAG_TOKENS), tokenizer_path="tokenizer"))


def write_native(checkpoint: Checkpoint, folder: Path, ledger: Ledger | None = None) -> None:
    """Write a folder that HRM-Text resumes from, as epoch 1 (0 for a model before its first step).

    One tensor is in memory at a time; `ledger` records them.
    """
    ledger, t = ledger or Ledger(), checkpoint.training
    config, metadata = _config_of(checkpoint), _metadata_of(checkpoint)
    model: dict[str, LazyTensor] = {}
    state: dict[str, dict[str, LazyTensor | torch.Tensor]] = {}
    for entry in table(checkpoint.architecture):
        model[entry.native] = ledger.noting(model_key(entry), _stored(checkpoint, RAW, entry))
        if entry.trained:
            updates = checkpoint.embedding_updates if is_embedding(entry) else checkpoint.iteration
            state[entry.native] = {"step": torch.tensor(float(updates)), **{
                name: ledger.noting(state_key(entry, name), _stored(checkpoint, part, entry))
                for part, name in PART_NAMES.items()}}
    group = dict(lr=torch.tensor(as_fp32(t.last_lr)), betas=(t.beta1, t.beta2), weight_decay=t.weight_decay,
                 ema=t.ema_decay, params=list(state))
    epoch = min(1, checkpoint.iteration)
    folder.mkdir(parents=True, exist_ok=True)
    save_lazily({"model": model, "optim": {"state": state, "param_groups": [group]}}, folder / f"fsdp2_epoch_{epoch}")
    carry, settings = f"carry_epoch_{epoch}.0.pt", {NATIVE_CONFIG_FILE: config, METADATA_FILE: metadata}
    with (folder / carry).open("wb") as file:
        write_archive(None, file)
    for name, values in settings.items():
        (folder / name).write_text(yaml.safe_dump(values), encoding="utf-8")
    target = folder / f"fsdp2_epoch_{epoch}"
    write_manifest(target, checkpoint.iteration, {}, describe_folder(
        target, beside=(f"../{name}" for name in (carry, *settings))))


def _stored(checkpoint: Checkpoint, part: str, entry: Rename) -> LazyTensor:
    if not entry.trained:  # the initial z_L, which HRM-Text stores in bf16
        return LazyTensor(entry.shape, torch.bfloat16, lambda: checkpoint.read(RAW, entry))
    return LazyTensor(entry.foreign_shape, torch.float32, lambda: entry.from_megatron(checkpoint.state(part, entry)))
