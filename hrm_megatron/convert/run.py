"""Convert a checkpoint folder from one format to another: the work of tools/convert_checkpoint.py."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.checkpoint.manifest import TRACKER_FILE
from hrm_megatron.checkpoint.verify import naming_another
from hrm_megatron.config import ConfigError
from hrm_megatron.convert.card import Sections
from hrm_megatron.convert.checkpoint import EMA, PARTS, RAW, TOKENS_KNOWN, Checkpoint
from hrm_megatron.convert.comparison import Loaded, compare, quantization_of
from hrm_megatron.convert.gguf_file import BYTES_OF_WEIGHT, Q8_0, check_gguf, library, read_back, write_gguf
from hrm_megatron.convert.gguf_names import NESTED
from hrm_megatron.convert.hf import FIXED, HF_CONFIG_FILE, MAX_SHARD_SIZE, left_out, read_hf, write_hf
from hrm_megatron.convert.hf_files import read_json
from hrm_megatron.convert.ledger import EXPORT_FILE, Ledger, progress
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.native import NATIVE_CONFIG_FILE, read_native, write_native
from hrm_megatron.convert.shared_stack import as_hrm
from hrm_megatron.convert.table import table
from hrm_megatron.convert.to_megatron import write_megatron
from hrm_megatron.data.folder_lock import open_and_lock
from hrm_megatron.program import check_folder, followed, whole_folder
from hrm_megatron.training.save_lock import LOCK_FILE

FORMATS = ("megatron", "hf", "native")
SAVE_FORMATS = (*FORMATS, "gguf")
WEIGHTS_ALONE = ("hf", "gguf")  # formats without optimizer state
RESERVE_BYTES = 1 << 20
VERIFIED_PARAMETERS = 2e9  # larger fp32 models do not fit into the memory of many machines


@dataclass(frozen=True)
class Conversion:
    """One conversion; `weights` None: everything that the output can hold, EMA weights for a weights-only format.

    `verify` loads the output and compares logits; None: only for models below VERIFIED_PARAMETERS.
    """

    load: Path
    load_format: str
    save: Path
    save_format: str
    weights: str | None = None
    ckpt_step: int | None = None
    tokenizer_model: Path | None = None
    dtype: str = "float32"
    max_shard_size: str = MAX_SHARD_SIZE
    gguf_keys: str | None = None
    data_report: Path | None = None
    evaluation: Path | None = None
    overwrite: bool = False
    verify_checkpoint: bool = True
    verify: bool | None = None
    allow_nonfinite: bool = False


def convert(job: Conversion) -> str:
    """Run one conversion and return a line about it; on failure raise a one-line ConfigError and leave no output."""
    if job.ckpt_step is not None and job.load_format == "hf":
        raise ConfigError(f"--ckpt-step {job.ckpt_step}: a transformers folder has no steps; leave the flag out")
    if job.save_format not in WEIGHTS_ALONE and (job.tokenizer_model or job.dtype != "float32"):
        raise ConfigError(f"--tokenizer-model and --dtype are for --save-format hf and gguf; {job.save_format} keeps "
                          "fp32 masters")
    for flag, given, of in ((f"--dtype {Q8_0}", job.dtype == Q8_0, "gguf"),
                            (f"--gguf-keys {job.gguf_keys}", job.gguf_keys, "gguf"),
                            (f"--max-shard-size {job.max_shard_size}", job.max_shard_size != MAX_SHARD_SIZE, "hf")):
        if given and job.save_format != of:
            raise ConfigError(f"{flag}: is for --save-format {of}; leave it out")
    for flag, path in (("--data-report", job.data_report), ("--evaluation", job.evaluation)):
        if path and job.save_format not in WEIGHTS_ALONE:
            raise ConfigError(f"{flag} {path}: is for the README.md of --save-format hf and gguf; leave it out")
    if job.save_format == "gguf":
        library()
    check_save(job.save, job.load, {"--tokenizer-model": job.tokenizer_model, "--data-report": job.data_report,
                                    "--evaluation": job.evaluation})
    if job.load_format != "megatron":
        return _convert(job, read_native(job.load, job.ckpt_step, job.verify_checkpoint)
                        if job.load_format == "native" else read_hf(job.load, job.verify_checkpoint))
    iteration = find_iteration(job.load, job.ckpt_step)
    with naming_another(iteration):
        return _convert(job, read_megatron(iteration, job.verify_checkpoint))


def _convert(job: Conversion, checkpoint: Checkpoint) -> str:
    checkpoint.check_asked(job.weights)
    step = checkpoint.step
    to_weights = job.save_format in WEIGHTS_ALONE or checkpoint.merged
    kind = job.weights or (EMA if checkpoint.iteration and to_weights else checkpoint.default_kind())
    if (job.weights or checkpoint.merged) and job.save_format not in WEIGHTS_ALONE:
        checkpoint = checkpoint.only_weights(kind)
    source = checkpoint
    if job.save_format in WEIGHTS_ALONE:
        checkpoint.require(kind)
        checkpoint = as_hrm(checkpoint)
    # Before the first step both kinds of weights are equal, and optimizer state is all zeros, if stored.
    alone = job.save_format in WEIGHTS_ALONE or not checkpoint.iteration or not checkpoint.has_state
    sections = Sections.read(job.data_report, job.evaluation)
    size_bytes = output_bytes(job, checkpoint)
    with new_folder(job.save, job.overwrite, size_bytes) as folder:
        with progress(size_bytes) as passed:
            ledger = Ledger(job.allow_nonfinite, passed)
            if job.save_format == "hf":
                write_hf(checkpoint, folder, kind, job.dtype, job.tokenizer_model, job.max_shard_size, ledger,
                         sections)
            elif job.save_format == "gguf":
                write_gguf(checkpoint, folder, kind, job.dtype, job.tokenizer_model, job.gguf_keys or NESTED, ledger,
                           sections)
            elif job.save_format == "native":
                write_native(checkpoint, folder, ledger)
            else:
                write_megatron(checkpoint, folder, ledger)
        settings = dataclasses.asdict(checkpoint.architecture)
        if job.save_format in WEIGHTS_ALONE:
            settings |= {"dtype": job.dtype, "bp_max_steps": checkpoint.training.bp_max_steps,
                         TOKENS_KNOWN: checkpoint.tokens_known}
        if alone:
            settings |= dict(weights=checkpoint.named(kind))
        ledger.write(folder, source=str(job.load), source_format=job.load_format, format=job.save_format,
                     iteration=step, settings=settings)
        compared = _compare(job, source, checkpoint, kind, ledger, folder)
    content = f"{checkpoint.named(kind) or 'the'} weights" if alone else "weights and optimizer state"
    said = (f"{job.save}: {content} of iteration {step}, {len(table(checkpoint.architecture))} "
            f"tensors, from {checkpoint.path}")
    if not checkpoint.architecture.gated and job.save_format != "megatron":
        said += ", as those of a gate of 1/2 with twice the output projections, which is the same function"
    if checkpoint.architecture.kind != source.architecture.kind:
        said += f" of a {source.architecture.kind.title}, as an HRM with its stack twice, which is the same function"
    if checkpoint.merged:
        said += ", adapters merged"
    if checkpoint.remark:
        said += f", which {checkpoint.remark}"
    if job.save_format == "megatron" and not checkpoint.has_state:
        said += "; train from them with --finetune, moments and EMA begin there"
    if job.save_format == "gguf":
        if not checkpoint.architecture.causal:
            said += "; llama.cpp reads prompts causally unless it is told otherwise, which the README.md beside it says"
        if job.tokenizer_model is None:
            said += "; no tokenizer in it, so that llama.cpp takes token ids only (--tokenizer-model puts one there)"
    if job.save_format == "hf" and job.tokenizer_model is None:
        said += "; no tokenizer beside them, and token ids of " + (
            str(job.load) if checkpoint.token_ids else "HRM-Text's tokenizers") + " (--tokenizer-model puts one there)"
    if job.load_format == job.save_format == "hf":
        said += left_out(source)
    if ledger.not_finite:
        said += f"; warning: NaN or infinities in {', '.join(ledger.not_finite)} (--allow-nonfinite)"
    return f"{said}; {compared}"


def _compare(job: Conversion, original: Checkpoint, checkpoint: Checkpoint, kind: str, ledger: Ledger,
             folder: Path) -> str:
    """Load the output, written from `checkpoint`, and compare its logits with those of `original`, unless this is
    disabled; return what to report."""
    if job.save_format == "gguf":
        check_gguf(folder, checkpoint.architecture, job.gguf_keys or NESTED, job.tokenizer_model is not None)
    skipped = "its logits were not compared with the source's"
    parameters = checkpoint.architecture.num_parameters
    if job.verify is False:
        return f"{skipped} (--no-verify)"
    if job.verify is None and parameters >= VERIFIED_PARAMETERS:
        return f"{skipped} ({parameters / 1e9:.1f} billion parameters; --verify compares them)"
    if ledger.not_finite:
        return f"{skipped}, which are NaN"
    kind = kind if job.save_format in WEIGHTS_ALONE else RAW
    by_transformers = job.load_format == "hf" and quantization_of(job.load) is None
    source = Loaded(job.load, job.load_format, None if by_transformers else original, kind, job.dtype)
    target = Loaded(folder, "gguf", read_back(folder, checkpoint)) if job.save_format == "gguf" else \
        Loaded(folder, job.save_format, dtype=job.dtype)
    return compare(source, target, checkpoint.architecture, checkpoint.training.seq_length)


def output_bytes(job: Conversion, checkpoint: Checkpoint) -> int:
    """Return the bytes of the tensors that will be written."""
    elements = sum(math.prod(entry.foreign_shape) for entry in table(checkpoint.architecture))
    if job.save_format in WEIGHTS_ALONE:
        return round(elements * BYTES_OF_WEIGHT[job.dtype])
    copies = len(PARTS)
    if job.save_format == "megatron":  # it stores the weights beside their fp32 masters
        copies = len(PARTS) + 1 if checkpoint.has_state else 1
    return elements * copies * 4


def check_save(save: Path, load: Path, inputs: Mapping[str, Path | None]) -> None:
    """Refuse an output folder that could not be written at the end, or that overlaps an input."""
    place, source = followed(save), followed(load)
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise ConfigError(f"--save {save}: overlaps --load {load}; choose a folder apart")
    check_folder("--save", save, inputs)


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is an export of these tools, or an HRM checkpoint of any format."""
    if any((folder / name).exists() for name in (EXPORT_FILE, TRACKER_FILE)):
        return True
    if (folder / NATIVE_CONFIG_FILE).exists():
        return any(folder.glob("fsdp2_epoch_*"))
    try:
        return read_json(folder / HF_CONFIG_FILE).get("model_type") == FIXED["model_type"]
    except ConfigError:
        return False


@contextlib.contextmanager
def new_folder(save: Path, overwrite: bool, size_bytes: int) -> Iterator[Path]:
    """Yield an empty folder that becomes `save` if the block succeeds, and is removed otherwise."""
    held = None
    try:
        held = _claim(save, overwrite)
        with whole_folder(save) as partial:
            if (free := shutil.disk_usage(partial).free) < (needed := size_bytes + RESERVE_BYTES):
                raise ConfigError(f"--save {save}: needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; free "
                                  "some space or choose another disk")
            try:
                yield partial
            except ConfigError as error:  # it may name the temporary folder
                if (hidden := str(partial)) not in str(error):
                    raise
                raise ConfigError(str(error).replace(hidden, str(save))) from error
            if held is None:  # something may have been created there during the block
                held = _claim(save, overwrite)
    except OSError as error:
        raise ConfigError(f"--save {save}: cannot write ({error.strerror or error}); nothing was left there") from error
    finally:
        if held is not None:
            os.close(held)


def _claim(save: Path, overwrite: bool) -> int | None:
    """Refuse a place whose contents must be kept, or where a run is training. If a run has trained there, return its
    lock, held until the descriptor is closed."""
    if save.exists():
        if not save.is_dir() or (any(save.iterdir()) and not is_checkpoint(save)):
            raise ConfigError(f"--save {save}: exists and is no checkpoint; choose another")
        if not overwrite and any(save.iterdir()):
            raise ConfigError(f"--save {save}: exists; pass --overwrite to replace all of it, or choose another")
    lock = save / LOCK_FILE
    return open_and_lock(lock, f"--save {save}", "choose another folder") if lock.exists() else None
