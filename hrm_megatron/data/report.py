"""Statistics of a dataset: size, lengths, sources, what was left out, and how well its examples fill rows."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.kept_examples import kept_count, kept_files
from hrm_megatron.data.mixture import Mixture, Selection
from hrm_megatron.data.plan import RowPlan
from hrm_megatron.data.run_report import Report
from hrm_megatron.data.sampling_rules import Rules

BLOCK_EXAMPLES = 1 << 22  # processed at a time
FILL_EXAMPLES = 1 << 22  # packed to estimate how full rows get
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
SHOWN_SOURCES = 40


@dataclass(frozen=True)
class Lengths:
    """Histogram: in `counts[n]` examples the part (prefix or response) has n tokens."""

    counts: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray) -> Lengths:
        counts = np.zeros(1, np.int64)
        for start in range(0, len(lengths), BLOCK_EXAMPLES):
            more = np.bincount(lengths[start:start + BLOCK_EXAMPLES], minlength=len(counts))
            more[:len(counts)] += counts
            counts = more
        return cls(counts)

    @property
    def mean(self) -> float:
        return float(self.counts @ np.arange(len(self.counts)) / self.counts.sum())

    @property
    def longest(self) -> int:
        return len(self.counts) - 1

    def quantile(self, share: float) -> int:
        """Return the smallest length that at least this share of the examples does not exceed."""
        return int(np.searchsorted(self.counts.cumsum(), share * self.counts.sum()))


@dataclass(frozen=True)
class SourceLine:
    """One source: its examples and tokens, truncated responses and skipped rows; and over the epochs of a plan the
    share of its examples that is `seen`, and how often each of those is (nan: not asked)."""

    name: str
    examples: int
    tokens: int
    truncated: int
    skipped: int
    seen: float = float("nan")
    repeats: float = float("nan")


@dataclass(frozen=True)
class Fill:
    """How full rows of `row_tokens` positions get when the `examples` that an epoch takes from the first `of` examples
    of a dataset are packed."""

    row_tokens: int
    of: int
    examples: int
    rows: int
    share: float


@dataclass(frozen=True)
class DatasetReport:
    """Everything shown of a dataset. `run` says what was left out; None for a dataset of the older form."""

    prefix: str
    examples: int
    tokens: int
    prefixes: Lengths
    responses: Lengths
    sources: tuple[SourceLine, ...]
    run: Report | None
    fill: Fill | None
    epochs: int
    kept: int | None = None  # number of examples, if duplicates were left out


def report_on(store: IndexedExamples, row_tokens: int | None = None, run: Report | None = None,
              rules: Rules | None = None, epochs: int = 0, seed: int = 0) -> DatasetReport:
    """Compute the statistics of a dataset: with `row_tokens` also how full such rows get, with `rules` or `epochs` also
    which share of each source these epochs show."""
    prefixes, responses = store.lengths()
    run = run or (Report(store.manifest) if store.manifest else None)
    lines = tuple(_source_lines(store, responses, prefixes))
    if epochs:
        if row_tokens is None:
            raise ConfigError("--epochs: which examples are long depends on the rows; give --seq-length")
        lines = tuple(_with_coverage(store, lines, Selection(seed=seed, rules=rules), row_tokens, epochs))
    elif rules:
        raise ConfigError("--sampling-rules: say over how many epochs with --epochs")
    return DatasetReport(store.prefix, len(store), int(store.metadata["tokens"]), Lengths.of(prefixes),
                         Lengths.of(responses), lines, run,
                         _fill(store, row_tokens, Selection(seed=seed, rules=rules)) if row_tokens else None, epochs,
                         kept_count(store))


def _source_lines(store: IndexedExamples, responses: np.ndarray, prefixes: np.ndarray) -> list[SourceLine]:
    if store.manifest:
        return [SourceLine(source.name, source.examples, source.shard.tokens if source.shard else 0, source.truncated,
                           sum(left.count for left in source.bad_rows.values()))
                for source in store.manifest.sources]
    tokens = int(prefixes.sum(dtype=np.int64) + responses.sum(dtype=np.int64))
    return [SourceLine(source.name, source.count, tokens, 0, 0) for source in store.sources]


def _with_coverage(store: IndexedExamples, lines: Sequence[SourceLine], selection: Selection, row_tokens: int,
                   epochs: int) -> list[SourceLine]:
    mixture = Mixture([store], row_tokens, selection)
    times = np.zeros(len(store), np.int64)
    for number in range(epochs):
        epoch = mixture.epoch(number)
        for start in range(0, len(epoch), BLOCK_EXAMPLES):
            ids = epoch.window(start, min(start + BLOCK_EXAMPLES, len(epoch))).ids
            np.add.at(times, ids, 1)
    ranges = {source.name: source for source in store.sources}
    found = []
    for line in lines:
        own = times[ranges[line.name].first:][:ranges[line.name].count] if line.name in ranges else times[:0]
        seen = int((own > 0).sum())
        found.append(SourceLine(line.name, line.examples, line.tokens, line.truncated, line.skipped,
                                seen / len(own) if len(own) else float("nan"),
                                int(own.sum()) / seen if seen else float("nan")))
    return found


def _fill(store: IndexedExamples, row_tokens: int, selection: Selection) -> Fill | None:
    count = min(len(store), FILL_EXAMPLES)
    chosen = None if count == len(store) else np.arange(count)
    mixture = Mixture([store], row_tokens, selection, example_ids=chosen)
    if chosen is not None and not any(len(block) for _, found in mixture.streams() for block in found):
        return None  # each of their prefixes alone fills a row
    rows = RowPlan(mixture, row_tokens, selection.seed).rows_of_epoch(0)
    return Fill(row_tokens, count, len(rows.example_ids), len(rows), rows.tokens / (len(rows) * row_tokens))


def markdown(report: DatasetReport, picture: Path | None = None) -> str:
    """Format a report as Markdown, with a link to its `picture`."""
    lines = [f"# {Path(report.prefix).name}", "",
             f"{report.examples:,} examples, {report.tokens:,} tokens"
             + (f", {report.run.truncated:,} responses truncated, {report.run.skipped.total():,} rows skipped"
                if report.run else ""), ""]
    if report.kept is not None:
        lines += [f"{report.kept:,} of these examples are trained on, the others are duplicates of some "
                  f"({kept_files(report.prefix)[1].name}); lengths and shares below are of all.", ""]
    if picture:
        lines += [f"![lengths, sources and what was left out]({picture.name})", ""]
    lines += ["| tokens | mean | " + " | ".join(f"{share:.0%}" for share in QUANTILES) + " | longest |",
              "|---" * (len(QUANTILES) + 3) + "|"]
    for name, lengths in (("prefix", report.prefixes), ("response", report.responses)):
        lines.append(f"| {name} | {lengths.mean:,.1f} | "
                     + " | ".join(f"{lengths.quantile(share):,}" for share in QUANTILES) + f" | {lengths.longest:,} |")
    if report.fill:
        fill = report.fill
        of = "" if fill.of == report.examples else f" of the first {fill.of:,}"
        lines += ["", f"Rows of {fill.row_tokens:,} positions are {fill.share:.2%} full: an epoch's {fill.examples:,} "
                      f"examples{of} in {fill.rows:,} rows."]
    lines += ["", *_source_table(report)]
    if report.run:
        left = report.run.lines()
        lines += ["", *(f"- {line}" for line in [*left, *report.run.work()])]
    return "\n".join(lines) + "\n"


def _coverage(line: SourceLine) -> tuple[str, str]:
    """Format the share of examples seen and how often each is; "-" if there is no such number."""
    return ("-" if math.isnan(line.seen) else f"{line.seen:.1%}",
            "-" if math.isnan(line.repeats) else f"{line.repeats:.2f}")


def _source_table(report: DatasetReport) -> list[str]:
    coverage = [f"seen in {report.epochs} epochs", "times each"] if report.epochs else []
    heads = ["source", "examples", "share of tokens", "truncated", "rows skipped", *coverage]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    largest = sorted(report.sources, key=lambda line: -line.tokens)
    for line in largest[:SHOWN_SOURCES]:
        shown = [line.name.replace("|", "\\|"), f"{line.examples:,}", f"{line.tokens / report.tokens:.1%}",
                 f"{line.truncated:,}", f"{line.skipped:,}", *(_coverage(line) if report.epochs else [])]
        lines.append(f"| {' | '.join(shown)} |")
    if len(largest) > SHOWN_SOURCES:
        rest = largest[SHOWN_SOURCES:]
        lines.append(f"| {len(rest):,} more | {sum(line.examples for line in rest):,} | "
                     f"{sum(line.tokens for line in rest) / report.tokens:.1%} |" + " |" * (len(heads) - 3))
    return lines
