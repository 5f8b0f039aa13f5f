"""Measure how evenly context parallel ranks share the attention of rows, by counting pairs."""
from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from hrm_megatron.attention.balance import balanced_order
from hrm_megatron.attention.prefix_lm import context_loads
from hrm_megatron.benchmark.attention import Pairs, fill_rows
from hrm_megatron.benchmark.count import Listed, count
from hrm_megatron.data.sampled import SampledFolder
from hrm_megatron.program import one_line


def drawn_rows(folder: SampledFolder, row_tokens: int, rows: int, seed: int = 0) -> list[Pairs]:
    """Return rows filled with (prefix, response) lengths drawn from a folder's first epoch, with replacement."""
    prefixes, targets = (lengths.tolist() for lengths in folder.epoch_lengths(0))
    lengths = [(p, t - 1) for p, t in zip(prefixes, targets, strict=True)]
    most = rows * row_tokens // min(map(sum, lengths)) + 1
    return fill_rows(random.Random(seed).choices(lengths, k=most), row_tokens, rows)


def shares(rows: Sequence[Pairs], row_tokens: int, ranks: int) -> tuple[list[float], list[float]]:
    """Return (busiest rank's pairs / mean) of each row, in the given order and in the balanced order."""
    def share(row: Pairs) -> float:
        loads = context_loads([row], row_tokens, ranks)
        return max(loads) * ranks / sum(loads)
    ordered = [[row[i] for i in balanced_order(row, row_tokens, ranks)] for row in rows]
    return [share(row) for row in rows], [share(row) for row in ordered]


def main() -> None:
    """Print mean and maximum over the rows of a folder, for both orders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="HRM-Text's sampled folder, as --sampled-data-path takes it")
    parser.add_argument("--row-tokens", type=count, nargs="+", action=Listed, default=[4096, 32_768])
    parser.add_argument("--ranks", type=count, nargs="+", action=Listed, default=[2, 4])
    parser.add_argument("--rows", type=count, default=64)
    args = parser.parse_args()
    folder = SampledFolder(args.folder)
    for row_tokens, ranks in itertools.product(args.row_tokens, args.ranks):
        given, balanced = shares(drawn_rows(folder, row_tokens, args.rows), row_tokens, ranks)
        print(f"rows of {row_tokens}, {ranks} ranks: busiest over mean {mean(given):.3f} (worst {max(given):.3f}) as "
              f"packed, {mean(balanced):.3f} (worst {max(balanced):.3f}) balanced")


if __name__ == "__main__":
    sys.exit(one_line(main))
