"""Quantize a checkpoint into a compressed-tensors folder: the work of tools/quantize_checkpoint.py."""
from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hrm_megatron.config import ConfigError
from hrm_megatron.convert.checkpoint import RAW, TOKENS_KNOWN, Checkpoint
from hrm_megatron.convert.comparison import DEQUANTIZED, Loaded, compare
from hrm_megatron.convert.hf import (
    left_out,
    refuse_others,
    token_ids_of,
    write_hf,
)
from hrm_megatron.convert.hf_tokenizer import ExportTokenizer, check_vocabulary
from hrm_megatron.convert.ledger import Ledger, progress
from hrm_megatron.convert.low_bit import LowBit, Scheme
from hrm_megatron.convert.quantization import Quantized
from hrm_megatron.convert.run import VERIFIED_PARAMETERS, new_folder
from hrm_megatron.convert.table import Rename, table
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.tokenizer import TOKENIZER_FILE, TextTokenizer, spells_as
from hrm_megatron.generate.load import opened, weights_kind
from hrm_megatron.parallel.patching import temporarily
from hrm_megatron.parallel.precision import DTYPES, multiply_in_fp32
from hrm_megatron.quantize.job import EXTRA, Job, check
from hrm_megatron.quantize.methods import FIRST_TICK, PLAIN, RECURRENT, Calibration, Quantizer, Say
from hrm_megatron.quantize.recurrence import Rows, batches
from hrm_megatron.quantize.rounding import round_plainly
from hrm_megatron.quantize.scores import score
from hrm_megatron.quantize.scores import table as table_of
from hrm_megatron.quantize.tuning import Tuning

LARGEST = 2.0 ** 126  # largest weight that no scheme rounds beyond the range of fp32 and bfloat16


def quantize(job: Job, say: Say = lambda line: None) -> list[str]:
    """Run one job and return lines about it; on failure raise a one-line ConfigError and leave no output."""
    check(job)
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
        # Refuse what write_hf would refuse, before the work.
        token_ids_of(checkpoint, ExportTokenizer.open(work.beside) if work.beside else None)
        size_bytes = job.quantization.size_bytes(checkpoint.architecture, DTYPES[job.dtype].itemsize)
        with new_folder(job.save, job.overwrite, size_bytes) as folder:
            lines = work.compared() if job.compare else []
            return [*lines, work.written(job.save, folder, size_bytes)]


class Work:
    """A job and its open checkpoint."""

    def __init__(self, job: Job, checkpoint: Checkpoint, kind: str, say: Say) -> None:
        multiply_in_fp32()
        self.job, self.checkpoint, self.kind, self.say = job, checkpoint, kind, say
        self.architecture = checkpoint.architecture
        # The given tokenizer, else the one of --load.
        self.beside = job.tokenizer_model or (job.load if (job.load / TOKENIZER_FILE).exists() else None)
        self.row_tokens = job.seq_length or checkpoint.training.seq_length
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.found: dict[str, dict[str, LowBit]] = {}  # by method
        self._unchecked: set[str] = set()  # datasets for which this was reported
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
        """The tokenizer beside the model, refused if the model was trained with other tokens; None if there is none, or
        if it was not given by a flag and cannot be opened."""
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
        """The quantizer with the whole model, which is read on first use."""
        if self._quantizer is None:
            weights = {entry.hf: self.weight(entry).to(self.device) for entry in table(self.architecture)}
            self._quantizer = Quantizer(self.architecture, weights, self.job.quantization, DTYPES[self.job.dtype],
                                        self.say)
        return self._quantizer

    def matrices(self, method: str) -> dict[str, LowBit]:
        """Return all matrices, quantized by one of METHODS; cached."""
        if method not in self.found:
            self.say(f"method {method}")
            if method == PLAIN:
                self.found[method] = self.quantizer.plainly()
                return self.found[method]
            calibration = self.calibration()  # may raise: do it before the model is read
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
        """Return a table of scores of all methods on --valid-data-path. Datasets are checked before the work."""
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
        """Write the folder that will become `save`, and return a line about it."""
        job, checkpoint = self.job, self.checkpoint
        method = f"{job.method}, {self._calibrated_by()}" if job.method != PLAIN else PLAIN
        with progress(size_bytes) as passed:
            ledger = Ledger(passed=passed)
            write_hf(checkpoint, folder, self.kind, job.dtype, self.beside, job.max_shard_size, ledger,
                     quantized=Quantized(job.quantization, self._matrix, method))
        kind = checkpoint.named(self.kind)
        ledger.write(folder, source=str(job.load), format="hf", iteration=checkpoint.step,
                     settings=asdict(self.architecture) | {TOKENS_KNOWN: checkpoint.tokens_known} | dict(
                         dtype=job.dtype, bp_max_steps=checkpoint.training.bp_max_steps, weights=kind,
                         scheme=job.quantization.spelled, method=method))
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
            return round_plainly(self.weight(entry), scheme)  # only this one in memory
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
                # bf16, as transformers dequantizes them: see convert/comparison.py.
                return entry.to_megatron(weight.bfloat16().float() if job.quantization.linear.is_float else weight)
            return entry.to_megatron(self.weight(entry).to(DTYPES[job.dtype]))
        expected = replace(self.checkpoint, iteration=0, parts=frozenset({RAW}), read=read)
        with quiet_loading():
            return compare(Loaded(job.load, DEQUANTIZED, expected), Loaded(folder, "hf"), self.architecture,
                           self.checkpoint.training.seq_length)

    def _rows(self, prefix: str, count: int | None) -> PackedRows:
        """Return the rows of a dataset; refuse other tokens than the model's. `count` None: each row once."""
        store, tokens = IndexedExamples(prefix), self.architecture.vocab_size
        if not self.checkpoint.takes(store.vocab_size):
            raise ConfigError(f"{prefix}: written with a tokenizer of {store.vocab_size} entries, the model has "
                              f"{tokens}; write it again with the tokenizer of the training data")
        self._check_tokenizer(prefix, store)
        if count is not None:
            return PackedRows(store, self.row_tokens, self.job.seed, count)
        rows = PackedRows(store, self.row_tokens, self.job.seed, 0, fixed=True)
        rows.num_rows = rows.rows_per_epoch
        return rows

    def _check_tokenizer(self, prefix: str, store: IndexedExamples) -> None:
        """Refuse data of another tokenizer. If the tokenizer beside --load does not record which one it is equivalent
        to, as in exports of older versions or when transformers saved it again, only say so."""
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
    """Suppress progress bars, and warnings of compressed-tensors, which also looks for the head in the inner model."""
    shown: Callable[..., None] = tqdm.__init__
    logger = logging.getLogger(EXTRA)

    def hidden(bar: object, *args: Any, **options: Any) -> None:
        shown(bar, *args, **{**options, "disable": True})
    with temporarily(tqdm, __init__=hidden), temporarily(logger, level=logging.ERROR):
        yield
