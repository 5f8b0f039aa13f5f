"""Quantize a checkpoint into a folder of compressed-tensors: what tools/quantize_checkpoint.py does."""
from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hrm_megatron.config import PRESETS, Architecture, ConfigError
from hrm_megatron.convert.checkpoint import RAW, Checkpoint
from hrm_megatron.convert.comparison import Loaded, compare
from hrm_megatron.convert.hf import (
    CONFIG_FILE,
    DTYPES,
    check_shard_size,
    left_out,
    refuse_others,
    token_ids_of,
    write_hf,
)
from hrm_megatron.convert.hf_files import read_json
from hrm_megatron.convert.hf_tokenizer import ExportTokenizer, check_vocabulary
from hrm_megatron.convert.ledger import Ledger, progress
from hrm_megatron.convert.low_bit import LowBit, Scheme
from hrm_megatron.convert.quantization import CONFIG_KEY, Quantization, Quantized
from hrm_megatron.convert.run import VERIFIED_PARAMETERS, check_save, new_folder
from hrm_megatron.convert.table import Rename, table
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.manifest import manifest_path
from hrm_megatron.data.tokenizer import TOKENIZER_FILE, TextTokenizer, spells_as
from hrm_megatron.generate.load import opened, weights_kind
from hrm_megatron.parallel.patching import temporarily
from hrm_megatron.parallel.precision import multiply_in_fp32
from hrm_megatron.quantize.methods import FIRST_TICK, PLAIN, RECURRENT, Calibration, Quantizer, Say
from hrm_megatron.quantize.recurrence import Rows, batches
from hrm_megatron.quantize.rounding import round_plainly
from hrm_megatron.quantize.scores import score
from hrm_megatron.quantize.scores import table as table_of
from hrm_megatron.quantize.tuning import Tuning

CALIBRATION = ("calibration_rows", "seq_length", "micro_batch_size", "tuning_steps", "seed")  # fields of a Job
OF_OUTPUT = ("method", "max_shard_size", "verify", "overwrite")  # likewise
GROUP_SIZES = {"int4": 64, "int8": 0, "mxfp4": 32}  # 0: a scale for each row; 32 is what MX prescribes
EMBEDDINGS = {"int8": Scheme("int8", 0), "keep": None}
EXTRA = "compressed_tensors"
LARGEST = 2.0 ** 126  # weight, which no scheme rounds up beyond what fp32 and bfloat16 have


@dataclass(frozen=True)
class Job:
    """One model to quantize; `save` None: only compare. `seq_length` None: the model's own.

    `given` names the fields that were asked for, which are refused where they would be without effect.
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


def quantize(job: Job, say: Say = lambda line: None) -> list[str]:
    """Do one job and return lines about it; raise ConfigError with one line, and then leave no output."""
    _check(job)
    with opened(job.load, job.ckpt_step, job.verify_checkpoint) as checkpoint:
        kind = weights_kind(checkpoint, job.weights)
        job.quantization.check(table(checkpoint.architecture))
        refuse_others(checkpoint, "transformers' HrmText", "quantize an HRM with pre-norm layers")
        if not checkpoint.architecture.gated:
            raise ConfigError(f"{checkpoint.path}: trained without a gate (--attention-gate); pass it through tools/"
                              "convert_checkpoint.py --save-format hf first, which gives it a gate of 1/2")
        if checkpoint.architecture.causal:
            raise ConfigError(f"{checkpoint.path}: trained with --attention-mask causal, and codes are chosen for "
                              "PrefixLM rows; not built, tools/convert_checkpoint.py writes it in 8 bits (gguf, "
                              "--dtype q8_0)")
        work = Work(job, checkpoint, kind, say)
        if job.save is None:
            return work.compared()
        # What write_hf would refuse, before the work.
        token_ids_of(checkpoint, ExportTokenizer.open(work.beside) if work.beside else None)
        size_bytes = job.quantization.size_bytes(checkpoint.architecture, DTYPES[job.dtype].itemsize)
        with new_folder(job.save, job.overwrite, size_bytes) as folder:
            lines = work.compared() if job.compare else []
            return [*lines, work.written(job.save, folder, size_bytes)]


def _check(job: Job) -> None:
    """Refuse settings that contradict each other or would be without effect, before anything is read."""
    if (job.load / CONFIG_FILE).exists() and CONFIG_KEY in read_json(job.load / CONFIG_FILE):
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


class Work:
    """A job and its open checkpoint."""

    def __init__(self, job: Job, checkpoint: Checkpoint, kind: str, say: Say) -> None:
        multiply_in_fp32()
        self.job, self.checkpoint, self.kind, self.say = job, checkpoint, kind, say
        self.architecture = checkpoint.architecture
        # The one that was named, else the one of --load.
        self.beside = job.tokenizer_model or (job.load if (job.load / TOKENIZER_FILE).exists() else None)
        self.row_tokens = job.seq_length or checkpoint.training.seq_length
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.found: dict[str, dict[str, LowBit]] = {}  # by method
        self._unchecked: set[str] = set()  # datasets of which this was said
        self._quantizer: Quantizer | None = None

    def weight(self, entry: Rename) -> torch.Tensor:
        """Read one tensor in transformers' layout and fp32."""
        tensor = entry.from_megatron(self.checkpoint.part_of(self.kind, entry)).float()
        if bad := int((~tensor.isfinite()).sum()):
            raise ConfigError(f"{self.checkpoint.path}: {bad} numbers of {entry.hf} are NaN or infinite; choose an "
                              "earlier checkpoint")
        if (largest := float(tensor.abs().max())) > LARGEST:
            raise ConfigError(f"{self.checkpoint.path}: {entry.hf} holds {largest:.3g}, too much to be rounded; choose "
                              "an earlier checkpoint")
        return tensor

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """The tokenizer that goes beside the model, refused where this was trained with other tokens; None where there
        is none, or one that nobody named and that cannot be opened."""
        if self.beside is None:
            return None
        try:
            tokenizer = TextTokenizer(self.beside)
        except ConfigError:
            if self.job.tokenizer_model:
                raise
            return None
        check_vocabulary(tokenizer, self.checkpoint)
        return tokenizer

    @property
    def quantizer(self) -> Quantizer:
        """The whole model, read when it is first asked for."""
        if self._quantizer is None:
            weights = {entry.hf: self.weight(entry).to(self.device) for entry in table(self.architecture)}
            self._quantizer = Quantizer(self.architecture, weights, self.job.quantization, DTYPES[self.job.dtype],
                                        self.say)
        return self._quantizer

    def matrices(self, method: str) -> dict[str, LowBit]:
        """All matrices by one of METHODS, made once."""
        if method not in self.found:
            self.say(f"method {method}")
            if method == PLAIN:
                self.found[method] = self.quantizer.plainly()
                return self.found[method]
            calibration = self.calibration()  # which may be refused: before the model is read
            self.found[method] = (
                self.quantizer.by_first_tick(calibration) if method == FIRST_TICK else
                self.quantizer.by_all_ticks(calibration, Tuning(self.job.tuning_steps)))
        return self.found[method]

    def calibration(self) -> Calibration:
        job = self.job
        assert job.data_path is not None
        rows = self._rows(job.data_path, job.calibration_rows + job.tuning_steps * job.micro_batch_size)
        first = range(job.calibration_rows)
        return Calibration(lambda: self._batches(rows[i] for i in first),
                           lambda: self._batches(rows[i] for i in itertools.count(job.calibration_rows)))

    def compared(self) -> list[str]:
        """A table of the scores of all methods on rows of --valid-data-path. Datasets are refused before the work."""
        assert self.job.valid_data_path is not None
        rows = self._rows(self.job.valid_data_path, None)
        self.calibration()
        models = {"before": self.quantizer.full} | {
            name: self.quantizer.dequantized(self.matrices(method)) for method, name in (
                (PLAIN, "plain rounding (rtn)"), (FIRST_TICK, "first tick (tick0)"),
                (RECURRENT, "all ticks (recurrent)"))}
        scores = score(self.architecture, self.quantizer.full, models, self._batches(rows[i] for i in range(len(rows))))
        return [f"{self.job.quantization.spelled}; {len(rows)} rows of {self.row_tokens} positions of "
                f"{self.job.valid_data_path}", *table_of(scores, "before")]

    def written(self, save: Path, folder: Path, size_bytes: int) -> str:
        """Write the folder that will be `save`, and return a line about it."""
        job, checkpoint = self.job, self.checkpoint
        method = f"{job.method}, {self._calibrated_by()}" if job.method != PLAIN else PLAIN
        with progress(size_bytes) as passed:
            ledger = Ledger(passed=passed)
            write_hf(checkpoint, folder, self.kind, job.dtype, self.beside, job.max_shard_size, ledger,
                     quantized=Quantized(job.quantization, self._matrix, method))
        kind = checkpoint.named(self.kind)
        ledger.write(folder, source=str(job.load), format="hf", iteration=checkpoint.step,
                     settings=asdict(self.architecture) | dict(
                         dtype=job.dtype, weights=kind, scheme=job.quantization.spelled, method=method))
        said = (f"{save}: {job.quantization.spelled}, {size_bytes:,} bytes for "
                f"{self.architecture.num_parameters:,} parameters, by {method}; {kind or 'the'} weights of iteration "
                f"{checkpoint.step} from {checkpoint.path}")
        if checkpoint.remark:
            said += f", which {checkpoint.remark}"
        if self.beside is None:
            said += "; no tokenizer beside them (--tokenizer-model puts one there)"
        return f"{said}{left_out(checkpoint)}; {self._verified(folder)}"

    def _calibrated_by(self) -> str:
        job = self.job
        tuned = f", {job.tuning_steps} steps of tuning" if job.method == RECURRENT else ""
        return f"{job.calibration_rows} rows of {self.row_tokens} positions{tuned}"

    def _matrix(self, entry: Rename, scheme: Scheme) -> LowBit:
        if self.job.method == PLAIN and PLAIN not in self.found:
            return round_plainly(self.weight(entry), scheme)  # no more than this one in memory
        found = self.matrices(self.job.method)[entry.hf]
        return LowBit(found.codes.cpu(), found.scales.cpu(), scheme)

    def _verified(self, folder: Path) -> str:
        job, parameters = self.job, self.architecture.num_parameters
        if job.verify is False or (job.verify is None and parameters >= VERIFIED_PARAMETERS):
            return "its logits were not compared" + (" (--no-verify)" if job.verify is False else " (--verify does)")

        def read(_: str, entry: Rename) -> torch.Tensor:
            scheme = job.quantization.of(entry)
            if scheme:
                weight = self._matrix(entry, scheme).dequantized()
                # As transformers has them then: see `compare`.
                return entry.to_megatron(weight.bfloat16().float() if job.quantization.linear.is_float else weight)
            return entry.to_megatron(self.weight(entry).to(DTYPES[job.dtype]))
        expected = replace(self.checkpoint, iteration=0, parts=frozenset({RAW}), read=read)
        with quiet_loading():
            return compare(Loaded(job.load, "dequantized", expected), Loaded(folder, "hf"), self.architecture,
                           self.checkpoint.training.seq_length)

    def _rows(self, prefix: str, count: int | None) -> PackedRows:
        """Rows of a dataset, refused where it was written with other tokens than the model's; None: each row once."""
        store, tokens = IndexedExamples(prefix), self.architecture.vocab_size
        rows_alone = tokens == self.architecture.padded_vocab_size  # of which some may stand for no token
        if store.vocab_size > tokens or (store.vocab_size < tokens and not rows_alone):
            raise ConfigError(f"{prefix}: written with a tokenizer of {store.vocab_size} entries, the model has "
                              f"{tokens}; write it again with the tokenizer of the training data")
        self._check_tokenizer(prefix, store)
        if count is not None:
            return PackedRows(store, self.row_tokens, self.job.seed, count)
        rows = PackedRows(store, self.row_tokens, self.job.seed, 0, fixed=True)
        rows.num_rows = rows.rows_per_epoch
        return rows

    def _check_tokenizer(self, prefix: str, store: IndexedExamples) -> None:
        """Refuse data of another tokenizer; only say so where the one beside --load does not say which it spells as, as
        in exports of older versions and where transformers has saved it again."""
        tokenizer, named = self.tokenizer, self.job.tokenizer_model
        if tokenizer and (named or tokenizer.fingerprint in spells_as(tokenizer.path).values()):
            store.check_tokenizer(tokenizer.fingerprint)
        elif self.beside and prefix not in self._unchecked and not (
                tokenizer and tokenizer.fingerprint == store.metadata["tokenizer_fingerprint"]):
            self._unchecked.add(prefix)
            self.say(f"whether {prefix} is of the tokenizer beside --load was not checked, as that does not say which "
                     "it was made with; --tokenizer-model checks it")

    def _batches(self, rows: Iterator[dict[str, torch.Tensor]]) -> Iterator[Rows]:
        return batches(rows, self.architecture, self.job.micro_batch_size, self.device)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Leave out bars of compressed-tensors, and its warnings: it looks for the head in the model's inner part too."""
    shown: Callable[..., None] = tqdm.__init__
    logger = logging.getLogger(EXTRA)

    def hidden(bar: object, *args: Any, **options: Any) -> None:
        shown(bar, *args, **{**options, "disable": True})
    with temporarily(tqdm, __init__=hidden), temporarily(logger, level=logging.ERROR):
        yield


def size_table(vocab_size: int = 65_536) -> list[str]:
    """Lines with the size of the files of each preset in GiB, by arithmetic over the shapes of its tensors."""
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
