"""The summary at the end of a preprocessing run, computed from the manifest that it has written."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hrm_megatron.data.incremental import Changes
from hrm_megatron.data.lint import Lint
from hrm_megatron.data.manifest import Manifest


@dataclass
class Report:
    """A dataset, its differences from its sources, and the work of this run: bytes, tokens and seconds."""

    manifest: Manifest
    changes: Changes = field(default_factory=Changes)
    seconds: float = 0.0
    read_bytes: int = 0
    tokens_made: int = 0

    @property
    def truncated(self) -> int:
        return sum(source.truncated for source in self.manifest.sources)

    @property
    def defaulted(self) -> int:
        """Number of examples that had no condition of their own."""
        return sum(source.defaulted for source in self.manifest.sources)

    @property
    def noted(self) -> Counter[str]:
        """Counts, by kind, of reported events during reading."""
        return sum((Counter(source.noted) for source in self.manifest.sources), Counter())

    @property
    def skipped(self) -> Counter[str]:
        """Counts, by kind, of the rows that were left out."""
        return Counter({kind: left.count for kind, left in self.manifest.bad_rows.items()})

    @property
    def lint(self) -> Lint:
        return self.manifest.lint

    def summary(self) -> str:
        """Return one line on the whole dataset."""
        totals = self.manifest.totals
        return (f"{totals['examples']} examples, {totals['tokens']} tokens, longest row {totals['max_row_length']} "
                f"positions, {self.truncated} responses truncated, {self.skipped.total()} rows skipped")

    def lines(self) -> list[str]:
        """Return lines on everything that was not taken from the rows unchanged."""
        defaulted = f"{self.defaulted} rows have no condition and took the default, or that of a rule"
        return [*([defaulted] if self.defaulted else []),
                *(f"{count} {what}" for what, count in sorted(self.noted.items())),
                *self.manifest.left_out(), *self.lint.lines()]

    def work(self) -> list[str]:
        """Return lines on what this run has done."""
        speed = [f"{self.read_bytes:,} bytes read, {self.tokens_made:,} tokens made in {self.seconds:.1f} s "
                 f"({self.tokens_made / self.seconds:,.0f} tokens/s)"] if self.read_bytes and self.seconds else []
        return [*([str(self.changes)] if self.changes else []), *speed]
