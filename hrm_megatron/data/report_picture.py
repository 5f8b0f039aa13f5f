"""A dataset's report as a picture, and one packed row as the model sees it. Needs matplotlib, which is optional."""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from hrm_megatron.data.report import DatasetReport, Lengths, SourceLine

BLUE, ORANGE, GREY, RED = "#1f77b4", "#d95f02", "#888888", "#c0392b"
BINS = 40
SHOWN_SOURCES = 12
NAME_CHARACTERS = 36
MASK_PIXELS = 2048  # per side: the picture has no higher resolution
TOKENS: dict[str, Any] = dict(fontsize=6.5, family="monospace", parse_math=False)  # $ is not math
NAMED_POSITIONS = 110  # up to this many positions have their tokens as tick labels
MASK_COLOURS = ListedColormap(["#f7f7f7", "#9ecae1", "#fdae6b"])  # masked, visible prefix key, visible response key


def draw_report(report: DatasetReport, path: Path) -> None:
    """Draw the lengths of prefixes and responses, the tokens of each source, and what was left out."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    _draw_lengths(axes[0, 0], report.prefixes, "prefix", BLUE)
    _draw_lengths(axes[0, 1], report.responses, "response", ORANGE)
    _draw_sources(axes[1, 0], report)
    _draw_left_out(axes[1, 1], report)
    fill = (f", rows of {report.fill.row_tokens:,} {report.fill.share:.2%} full" if report.fill else "")
    figure.suptitle(f"{Path(report.prefix).name}: {report.examples:,} examples, {report.tokens:,} tokens{fill}",
                    parse_math=False)
    figure.savefig(path, dpi=110)


def _draw_lengths(axes: Axes, lengths: Lengths, what: str, colour: str) -> None:
    shortest = int(np.flatnonzero(lengths.counts)[0])
    edges = np.unique(np.geomspace(max(shortest, 1), lengths.longest + 1, BINS + 1).round().astype(int)) \
        if lengths.longest > 20 * max(shortest, 1) else np.unique(
            np.linspace(shortest, lengths.longest + 1, BINS + 1).round().astype(int))
    heights = np.add.reduceat(lengths.counts, edges[:-1])
    axes.bar(edges[:-1], heights, np.diff(edges), align="edge", color=colour, edgecolor="white", linewidth=0.3)
    if lengths.longest > 20 * max(shortest, 1):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    for share, style in ((0.5, "-"), (0.99, ":")):
        at = lengths.quantile(share)
        axes.axvline(at, color="black", linestyle=style, linewidth=1, label=f"{share:.0%} of examples up to {at:,}")
    axes.set_xlabel(f"{what}, tokens (longest {lengths.longest:,}, mean {lengths.mean:,.1f})")
    axes.set_ylabel("examples")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(loc="upper right", fontsize="small")


def _draw_sources(axes: Axes, report: DatasetReport) -> None:
    lines = sorted(report.sources, key=lambda line: -line.tokens)
    if len(lines) > SHOWN_SOURCES:
        rest = lines[SHOWN_SOURCES - 1:]
        lines = [*lines[:SHOWN_SOURCES - 1], SourceLine(f"{len(rest):,} more", *(
            sum(getattr(line, name) for line in rest) for name in ("examples", "tokens", "truncated", "skipped")))]
    bars = _draw_bars(axes, [line.name for line in lines], [line.tokens for line in lines], BLUE)
    axes.bar_label(bars, [f" {line.tokens / report.tokens:.1%}" + (f", {line.seen:.0%} seen" if line.seen == line.seen
                                                                   else "") for line in lines], fontsize="small")
    axes.margins(x=0.4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="x", labelrotation=20)
    axes.set_xlabel("tokens by source" + (f"; seen in {report.epochs} epochs" if report.epochs else ""))


def _draw_left_out(axes: Axes, report: DatasetReport) -> None:
    if report.run is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "an older version has written this:\nit does not say what was left out", ha="center")
        return
    counts: dict[str, int] = {"responses truncated": report.run.truncated, "default condition": report.run.defaulted,
              **{f"skipped: {kind}": count for kind, count in sorted(report.run.skipped.items())},
              **dict(sorted(report.run.noted.items()))}
    if not any(counts.values()):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "every row is in it, as it stood", ha="center")
        return
    bars = _draw_bars(axes, [*counts], [*counts.values()], RED)
    axes.bar_label(bars, [f" {count:,}" for count in counts.values()], fontsize="small")
    axes.margins(x=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.set_xlabel("rows and examples that are not as they stood")


def _draw_bars(axes: Axes, names: Sequence[str], lengths: Sequence[int], colour: str) -> BarContainer:
    """Draw a bar for each name, the first on top; shortened names may be equal."""
    bars = axes.barh(range(len(names)), lengths, color=colour)
    axes.set_yticks(range(len(names)), [_shortened(name) for name in names])
    axes.invert_yaxis()
    return bars


def _shortened(name: str) -> str:
    half = (NAME_CHARACTERS - 1) // 2  # files in a folder differ at the ends of their names
    name = name if len(name) <= NAME_CHARACTERS else f"{name[:half]}…{name[-half:]}"
    return name.replace("$", r"\$")  # an unescaped $ would start math


def shown_positions(row_tokens: int, pairs: Sequence[tuple[int, int]]) -> int:
    """Return how many positions of a row a picture shows: all examples, and one of the padding if there is any."""
    return min(row_tokens, max(sum(p + r for p, r in pairs) + 1, 8))


def draw_row(texts: Sequence[str], labels: Sequence[str], pairs: Sequence[tuple[int, int]], mask: np.ndarray,
             title: str, path: Path) -> None:
    """Draw one packed row: `texts` [s] of its positions with their `labels` ("" for none), and the attention mask [n,
    n] of its `shown_positions` (True: the query of this picture row sees the key of this column). `pairs` are (prefix,
    response) positions of each example."""
    shown = len(mask)
    key_colours = np.full(shown, 2, np.uint8)
    borders, start = [], 0
    for p, r in pairs:
        key_colours[start:start + p] = 1
        start += p + r
        borders.append(start)
    step = -(-shown // MASK_PIXELS)
    colours = mask[::step, ::step] * key_colours[::step]
    named = shown <= NAMED_POSITIONS
    size = max(7.0, 0.15 * shown + 3) if named else 9.0
    figure = Figure(figsize=(size + 1.5, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(colours, cmap=MASK_COLOURS, vmin=0, vmax=2, interpolation="nearest",
                extent=(-0.5, shown - 0.5, shown - 0.5, -0.5))
    for end, (p, r) in zip(borders, pairs, strict=True):
        axes.add_patch(Rectangle((end - p - r - 0.5, end - p - r - 0.5), p + r, p + r, fill=False, edgecolor="black",
                                 linewidth=1.4))
        axes.plot([end - p - r - 0.5, end - 0.5], [end - r - 0.5] * 2, color=GREY, linewidth=0.8, linestyle="--")
    if named:
        axes.set_yticks(range(shown), [f"{text} → {label}" if label else text for text, label in zip(
            texts[:shown], labels[:shown], strict=True)], **TOKENS)
        axes.set_xticks(range(shown), texts[:shown], rotation=90, **TOKENS)
    else:
        axes.set_xticks(borders)
        axes.set_yticks(borders)
    axes.set_xlabel("keys: blue where a prefix is seen, orange where a response is")
    axes.set_ylabel("queries" + (" → label" if named else " (rows this long are named in the text alone)"))
    axes.set_title(title, fontsize="medium", parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks glyphs of some scripts; the text output has them
        figure.savefig(path, dpi=110)
