"""Plain documents as examples: runs of consecutive sentences that fill the context, each cut into a prefix and a
response.

The cuts depend only on the document's text and a seed, not on its place, its neighbours or the number of workers.
"""
from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from hrm_megatron.data.example import BadRow, Example, RawText, RowFormat, make_example, text_of
from hrm_megatron.data.sentences import sentence_starts

CHARACTERS_PER_TOKEN = 4  # a rough estimate, for use before there is a tokenizer


@dataclass(frozen=True)
class Sizes:
    """What documents are cut by: the positions of an example, and a function that counts the tokens of texts."""

    context_size: int
    count: Callable[[Sequence[str]], Sequence[int]]


BY_CHARACTERS = Sizes(4096, lambda texts: [-(-len(text) // CHARACTERS_PER_TOKEN) for text in texts])


class Window(NamedTuple):
    """An example as offsets in the document: where its prefix and its response begin, and where it ends."""

    start: int
    border: int
    end: int


def document_examples(row: dict[str, Any], place: str, rows: RowFormat, raw: RawText, noted: Counter[str],
                      sizes: Sizes) -> list[Example]:
    """Cut a document into examples. A document without a condition has no tags, unless there is a default condition."""
    text = text_of(row, raw.key, place, "--text-key").strip()
    if not text:
        noted["empty documents, passed over"] += 1
        return []
    if len(text) > rows.max_characters:
        raise BadRow("row too long", f"{place}: a document of {len(text):,} characters, --max-characters is "
                                     f"{rows.max_characters}; split it or raise that")
    if row.get(rows.keys[0]) is None and rows.default_condition is None:
        row = {**row, rows.keys[0]: ""}
    condition = make_example(row, place, rows, "", "").condition
    tags = len(condition.split(",")) if condition.strip() else 0
    room = sizes.context_size - 2 - tags  # minus boq, eoq and the tags; eoa is only a label and takes no position
    if room < 1:
        raise BadRow("no room", f"{place}: {sizes.context_size} positions have no room for text; raise --context-size")
    seen: Counter[str] = Counter()
    starts = sentence_starts(text, raw.sentence_model)
    windows = _windows(text, starts, room, raw, sizes, seen)
    noted.update(+seen)
    return [make_example(row, place, rows, text[window.start:window.border], text[window.border:window.end])
            for window in windows]


def _windows(text: str, starts: list[int], room: int, raw: RawText, sizes: Sizes, seen: Counter[str]) -> list[Window]:
    """Fill windows of `room` tokens; retry with a smaller aim if sentences have more tokens joined than singly."""
    digest = hashlib.blake2b(f"{raw.seed}\0{text}".encode(), digest_size=8).digest()
    aim = room
    while True:
        chance = random.Random(int.from_bytes(digest, "little"))
        starts, lengths = _short_enough(text, starts, aim, sizes, seen)
        runs = _runs(lengths, aim)
        windows = [_with_border(text, starts, lengths, first, last, chance.uniform(*raw.prefix_fraction))
                   for first, last in runs]
        prefixes = sizes.count([text[window.start:window.border] for window in windows])
        responses = sizes.count([text[window.border:window.end] for window in windows])
        most = max((prefix + response for prefix, response, (first, last) in zip(prefixes, responses, runs, strict=True)
                    if last - first > 1), default=0)  # a smaller aim cannot split one sentence
        if most <= room or aim == 1:
            seen["examples of one sentence, without a prefix"] += sum(last - first == 1 for first, last in runs)
            return windows
        aim = max(1, aim - (most - room))


def _short_enough(text: str, starts: list[int], most: int, sizes: Sizes,
                  seen: Counter[str]) -> tuple[list[int], list[int]]:
    """Split sentences longer than `most` tokens at whitespace, or between characters where there is none."""
    ends = [*starts[1:], len(text)]
    lengths = sizes.count([text[start:end] for start, end in zip(starts, ends, strict=True)])
    seen.setdefault("sentences longer than the context, cut inside", sum(length > most for length in lengths))
    short: list[tuple[int, int]] = []
    waiting = list(zip(starts, ends, lengths, strict=True))[::-1]
    while waiting:
        start, end, length = waiting.pop()
        visible = start + len(text[start:end]) - len(text[start:end].lstrip())
        if length <= most or end - visible < 2:
            short.append((start, length))
            continue
        middle = _middle(text, visible, end)
        first, second = sizes.count([text[start:middle], text[middle:end]])
        waiting += [(middle, end, second), (start, middle, first)]
    return [start for start, _ in short], [length for _, length in short]


def _middle(text: str, start: int, end: int) -> int:
    """Return the whitespace after a word that is nearest to the middle, if there is some in the middle half."""
    middle, reach = (start + end) // 2, (end - start) // 4
    for distance in range(reach):
        for place in (middle - distance, middle + distance):
            if text[place].isspace() and not text[place - 1].isspace():
                return place
    return middle


def _runs(lengths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Return maximal runs of sentences that fit in `room` together, as (first, end)."""
    runs, first, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > first and total + length > room:
            runs.append((first, i))
            first, total = i, 0
        total += length
    return [*runs, (first, len(lengths))]


def _with_border(text: str, starts: Sequence[int], lengths: Sequence[int], first: int, last: int,
                 fraction: float) -> Window:
    """Cut a run at the sentence border nearest to `fraction` of its tokens; the response has at least one sentence.

    Whitespace at the ends of the run is left out; whitespace at the border belongs to the response.
    """
    before = [0, *accumulate(lengths[first:last - 1])]
    aim = fraction * sum(lengths[first:last])
    nearest = min(range(len(before)), key=lambda i: abs(before[i] - aim))
    end = starts[last] if last < len(starts) else len(text)
    run = text[starts[first]:end]
    start = starts[first] + len(run) - len(run.lstrip())
    return Window(start, max(start, starts[first + nearest]), start + len(run.strip()))
