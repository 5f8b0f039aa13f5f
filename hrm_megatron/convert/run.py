"""Convert a checkpoint folder from one format into another: what tools/convert_checkpoint.py does."""
from __future__ import annotations

import contextlib
import math
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from hrm_megatron.checkpoint.folders import TRACKER_FILE, find_iteration
from hrm_megatron.checkpoint.verify import naming_another
from hrm_megatron.config import ConfigError
from hrm_megatron.convert.checkpoint import EMA, PARTS, RAW, Checkpoint
from hrm_megatron.convert.hf import CONFIG_FILE, DTYPES, read_hf, write_hf
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.native import CONFIG_FILE as NATIVE_CONFIG_FILE
from hrm_megatron.convert.native import read_native, write_native
from hrm_megatron.convert.table import table
from hrm_megatron.convert.to_megatron import write_megatron
from hrm_megatron.program import signals_held

FORMATS = ("megatron", "hf", "native")
SIGNATURES = (TRACKER_FILE, CONFIG_FILE, NATIVE_CONFIG_FILE)  # one of them is in every folder written here
RESERVE_BYTES = 1 << 20


@dataclass(frozen=True)
class Conversion:
    """One conversion; `weights` None: everything that the output can hold, EMA weights where it holds weights only."""

    load: Path
    load_format: str
    save: Path
    save_format: str
    weights: str | None = None
    ckpt_step: int | None = None
    tokenizer_model: Path | None = None
    dtype: str = "float32"
    max_shard_size: str = "5GB"
    overwrite: bool = False
    verify_checkpoint: bool = True


def convert(job: Conversion) -> str:
    """Do one conversion and return a line about it; raise ConfigError with one line, and then leave no output."""
    if job.ckpt_step is not None and job.load_format == "hf":
        raise ConfigError(f"--ckpt-step {job.ckpt_step}: a transformers folder has no steps; leave the flag out")
    if not job.verify_checkpoint and job.load_format == "hf":
        raise ConfigError("--no-verify-checkpoint: a transformers folder has no checksums to skip; leave the flag out")
    if job.save_format != "hf" and (job.tokenizer_model or job.dtype != "float32"):
        raise ConfigError(f"--tokenizer-model and --dtype are for --save-format hf; {job.save_format} keeps fp32 "
                          "masters")
    save, load = job.save.resolve(), job.load.resolve()
    if save == load or save in load.parents or load in save.parents:
        raise ConfigError(f"--save {job.save}: overlaps --load {job.load}; choose a folder apart")
    if job.load_format != "megatron":
        return _convert(job, read_native(job.load, job.ckpt_step, job.verify_checkpoint)
                        if job.load_format == "native" else read_hf(job.load))
    iteration = find_iteration(job.load, job.ckpt_step)
    with naming_another(iteration):
        return _convert(job, read_megatron(iteration, job.verify_checkpoint))


def _convert(job: Conversion, checkpoint: Checkpoint) -> str:
    if job.weights and job.save_format != "hf":
        checkpoint = checkpoint.only_weights(job.weights)
    kind = job.weights or (EMA if EMA in checkpoint.parts or job.load_format != "hf" else RAW)
    if job.save_format == "hf":
        checkpoint.require(kind)
    entries = table(checkpoint.architecture)
    with (new_folder(job.save, job.overwrite, output_bytes(job, checkpoint)) as folder,
          tqdm(total=len(entries), unit=" tensors", disable=None) as bar):
        if job.save_format == "hf":
            write_hf(checkpoint, folder, kind, job.dtype, job.tokenizer_model, job.max_shard_size, bar.update)
        elif job.save_format == "native":
            write_native(checkpoint, folder, bar.update)
        else:
            write_megatron(checkpoint, folder, bar.update)
    whole = job.save_format != "hf" and EMA in checkpoint.parts
    content = "weights and optimizer state" if whole else f"{kind} weights"
    said = f"{job.save}: {content} of iteration {checkpoint.iteration}, {len(entries)} tensors, from {checkpoint.path}"
    if checkpoint.remark:
        said += f", which {checkpoint.remark}"
    if job.save_format == "hf" and job.tokenizer_model is None:
        said += "; no tokenizer beside them, and token ids of " + (
            str(job.load) if checkpoint.token_ids else "HRM-Text's tokenizers") + " (--tokenizer-model puts one there)"
    return said


def output_bytes(job: Conversion, checkpoint: Checkpoint) -> int:
    """Size of the tensors that will be written."""
    elements = sum(math.prod(entry.shape) for entry in table(checkpoint.architecture))
    if job.save_format == "hf":
        return elements * DTYPES[job.dtype].itemsize
    copies = len(PARTS) + (job.save_format == "megatron")  # Megatron stores weights beside their masters
    return elements * copies * 4


@contextlib.contextmanager
def new_folder(save: Path, overwrite: bool, size_bytes: int) -> Iterator[Path]:
    """Give an empty folder that becomes `save` when the block ends well, and vanishes otherwise."""
    if save.exists():
        if not save.is_dir() or (any(save.iterdir()) and not any((save / name).exists() for name in SIGNATURES)):
            raise ConfigError(f"--save {save}: exists and is no checkpoint; choose another")
        if not overwrite and any(save.iterdir()):
            raise ConfigError(f"--save {save}: exists; pass --overwrite to replace all of it, or choose another")
    partial, replaced = (save.with_name(f".{save.name}.{state}-{uuid.uuid4().hex}")
                         for state in ("partial", "replaced"))
    try:
        partial.mkdir(parents=True)
        if (free := shutil.disk_usage(partial).free) < size_bytes + RESERVE_BYTES:
            raise ConfigError(f"--save {save}: needs {size_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; free "
                              "some space or choose another disk")
        yield partial
        if save.exists():
            save.rename(replaced)
        partial.rename(save)
    except ConfigError:
        raise
    # safetensors and torch report a full disk in classes of their own, one of them no Exception.
    except (Exception, CheckpointException) as error:
        full = partial.exists() and shutil.disk_usage(partial).free < RESERVE_BYTES
        if not full and not isinstance(error, OSError):
            raise
        reason = "no space left on device" if full else getattr(error, "strerror", None) or error
        raise ConfigError(f"--save {save}: cannot write ({reason}); nothing was left there") from error
    finally:
        with signals_held():
            if replaced.exists() and not save.exists():
                replaced.rename(save)
            for leftover in (partial, replaced):
                shutil.rmtree(leftover, ignore_errors=True)
