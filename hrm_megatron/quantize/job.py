"""Settings of a quantization job, and the checks that they do not contradict each other."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hrm_megatron.config import PRESETS, Architecture, ConfigError
from hrm_megatron.convert.hf import HF_CONFIG_FILE, check_shard_size
from hrm_megatron.convert.hf_files import read_json
from hrm_megatron.convert.low_bit import Scheme
from hrm_megatron.convert.quantization import CONFIG_KEY, Quantization
from hrm_megatron.convert.run import check_save
from hrm_megatron.data.manifest import manifest_path
from hrm_megatron.quantize.methods import PLAIN, RECURRENT

CALIBRATION = ("calibration_rows", "seq_length", "micro_batch_size", "tuning_steps", "seed")  # fields of Job
OF_OUTPUT = ("method", "max_shard_size", "verify", "overwrite")  # fields of Job that only --save uses
GROUP_SIZES = {"int4": 64, "int8": 0, "mxfp4": 32}  # 0: one scale per row; MX prescribes 32
EMBEDDINGS = {"int8": Scheme("int8", 0), "keep": None}
EXTRA = "compressed_tensors"


@dataclass(frozen=True)
class Job:
    """One model to quantize; `save` None: only compare. `seq_length` None: that of the model.

    `given` names the fields that were set explicitly; they are refused where they would have no effect.
    """

    load: Path
    save: Path | None = None
    scheme: str = "int4"
    group_size: int | None = None
    embedding: str = "int8"
    method: str = RECURRENT
    data_path: str | None = None
    calibration_rows: int = 64
    seq_length: int | None = None
    micro_batch_size: int = 4
    tuning_steps: int = 200
    seed: int = 1234
    compare: bool = False
    valid_data_path: str | None = None
    weights: str | None = None
    ckpt_step: int | None = None
    tokenizer_model: Path | None = None
    dtype: str = "bfloat16"
    max_shard_size: str = "5GB"
    overwrite: bool = False
    verify_checkpoint: bool = True
    verify: bool | None = None
    given: frozenset[str] = frozenset()

    @property
    def quantization(self) -> Quantization:
        sizes = GROUP_SIZES[self.scheme] if self.group_size is None else self.group_size
        return Quantization(Scheme(self.scheme, sizes), EMBEDDINGS[self.embedding])

    @property
    def calibrates(self) -> bool:
        return self.compare or self.method != PLAIN


def check(job: Job) -> None:
    """Refuse settings that contradict each other or would have no effect, before anything is read."""
    if (job.load / HF_CONFIG_FILE).exists() and CONFIG_KEY in read_json(job.load / HF_CONFIG_FILE):
        raise ConfigError(f"--load {job.load}: is quantized already; give the checkpoint that it was made from")
    if job.group_size is not None and job.scheme != "int4":
        raise ConfigError(f"--group-size {job.group_size}: {job.scheme} has its own; leave the flag out")
    if job.quantization.linear.is_float and job.dtype == "float32":
        raise ConfigError(f"--dtype {job.dtype}: transformers computes {job.scheme} in bfloat16 alone; leave the flag "
                          "out")
    if job.calibrates and job.data_path is None:
        raise ConfigError(f"--data-path: {'--compare' if job.compare else f'--method {job.method}'} calibrates with "
                          "rows of a dataset; name one that tools/preprocess_data.py made, or choose --method rtn")
    if not job.calibrates and job.data_path is not None:
        raise ConfigError(f"--data-path {job.data_path}: --method {PLAIN} reads no data; leave the flag out")
    if job.compare != (job.valid_data_path is not None):
        raise ConfigError("--compare and --valid-data-path belong together: the rows that the table is made of")
    if job.save is None and not job.compare:
        raise ConfigError("--save: nothing to do without it; give a folder to write, or --compare")
    if not job.calibrates:
        _refuse_given(job, CALIBRATION, f"--method {PLAIN} reads no data")
    elif not job.compare and job.method != RECURRENT:
        _refuse_given(job, ("tuning_steps",), f"--method {job.method} tunes nothing")
    if job.save is None:
        _refuse_given(job, OF_OUTPUT, "is about --save, which is not given; --compare shows every method")
    for name in ("calibration_rows", "micro_batch_size", "seq_length"):
        if (value := getattr(job, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("tuning_steps", "seed"):
        if getattr(job, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(job, name)}: must not be negative")
    if job.save and job.verify is not False and find_spec(EXTRA) is None:
        raise ConfigError("the package compressed-tensors is missing, by which transformers loads what is written; "
                          "pip install 'hrm_megatron[quantize]', or pass --no-verify to write without a look")
    if job.save:
        check_shard_size(job.max_shard_size)
        data = {"--data-path": job.data_path, "--valid-data-path": job.valid_data_path}
        check_save(job.save, job.load, {"--tokenizer-model": job.tokenizer_model} | {
            flag: manifest_path(prefix) if prefix else None for flag, prefix in data.items()})


def _refuse_given(job: Job, names: Iterable[str], why: str) -> None:
    for name in names:
        if name in job.given:
            raise ConfigError(f"--{name.replace('_', '-')}: {why}; leave the flag out")


def size_table(vocab_size: int = 65_536) -> list[str]:
    """Return a table of the file sizes of each preset in GiB, computed from tensor shapes."""
    kinds = {f"{scheme.name} g{scheme.group_size}" if scheme.group_size else scheme.name: scheme
             for scheme in (Scheme("int4", 64), Scheme("int4", 128), Scheme("mxfp4", 32), Scheme("int8", 0))}
    lines = [f"{'GiB':10} {'parameters':>14} {'bf16':>7} " + " ".join(f"{name:>10}" for name in kinds)
             + "   (head as layers, int8 embedding)"]
    for name, p in PRESETS.items():
        a = Architecture(p.num_layers, p.hidden_size, p.num_attention_heads, p.ffn_hidden_size, vocab_size)
        sizes = [Quantization(scheme, EMBEDDINGS["int8"]).size_bytes(a) for scheme in kinds.values()]
        lines.append(f"{name:10} {a.num_parameters:14,} {2 * a.num_parameters / 2**30:7.3f} "
                     + " ".join(f"{size / 2**30:10.3f}" for size in sizes))
    return lines
