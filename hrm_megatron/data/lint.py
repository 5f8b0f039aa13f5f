"""Find data that can be read but silently ruins a model: counts and first places by kind, refused if asked."""
from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.characters import CONTROL, CONTROLS, LOST, PRECOMPOSED, VISIBLE, Texts
from hrm_megatron.data.example_batch import ExampleBatch

LINT = ("warn", "error", "off")
# Remains of LaTeX commands whose backslash and first letter JSON has decoded to one control character. Backspace, form
# feed and lone carriage return precede a letter nowhere else; the remains after a tab or a newline are not words, or
# contain a brace that no text has there.
BROKEN_LATEX = tuple((control + rest).encode() for control, ends in (
    ("\x08", ("oxed", "egin", "eta", "ar", "inom", "mod", "ig", "f{", "oldsymbol", "ullet", "ot", "ackslash")),
    ("\x0c", ("rac", "orall", "box", "lat", "rown", "lushleft", "ootnote")),
    ("\t", ("imes", "ext{", "extbf{", "extit{", "extrm{", "heta", "riangle", "ilde{", "frac{", "herefore", "binom{",
            "ag{", "extstyle")),
    ("\n", ("abla", "eq ", "eq\\", "eq{", "otin", "earrow", "ewline\\", "ewcommand")),
    ("\r", ("ight)", "ight]", "ight\\", "ight|", "ight.", "angle", "ceil", "floor", "ho ", "ho_", "brace", "vert")),
) for rest in ends)
FIRST_CONTROL = min(map(ord, CONTROLS))
_BEGINNINGS = np.zeros((max(map(ord, CONTROLS)) - FIRST_CONTROL + 1, 256, 256), bool)  # by the first three bytes
for part in BROKEN_LATEX:
    _BEGINNINGS[part[0] - FIRST_CONTROL, part[1], part[2]] = True
CONSTANT_FROM = 8  # a source with at least this many rows, all with the same response, is suspicious
LATEX, REPLACEMENT, UNKNOWN, ECHO, BLANK, TRUNCATED, SPECIAL, DECOMPOSED, COMPOSED = (
    "latex", "replacement", "unknown", "echo", "blank", "truncated", "special", "decomposed", "composed")
MEANINGS = {  # of each count: what it counts, and the remedy
    LATEX: "texts with control characters that JSON made of LaTeX (\"\\boxed\" is backspace and oxed); write the "
           "backslashes of such texts twice in the JSON",
    REPLACEMENT: "texts with U+FFFD, the mark of a character that decoding lost; read them in their own encoding",
    UNKNOWN: "texts with characters that the tokenizer has no token for: its unknown token stands in their place; take "
             "a tokenizer with all bytes, or drop the rows",
    ECHO: "responses equal to their instruction; drop the rows unless copying is to be learned",
    BLANK: "texts without any visible character; drop the rows",
    TRUNCATED: "responses cut by --context-size, whose end is not learned; raise it or drop the rows",
    SPECIAL: "texts with the string of a special token, which are spelled as text; --control-tokens-in-text makes "
             "control tokens of those that shall be some",
    DECOMPOSED: "texts in another form than NFC beside others in NFC: one word has two spellings for whoever compares "
                "texts; normalize the sources (the ids are of NFC, if the tokenizer's normalizer is)",
}


@dataclass
class Lint:
    """Counts of what was found, and the first place of each kind. Merging parts in the order of their files gives the
    same result as one part."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    responses: dict[str, tuple[str, int]] = field(default_factory=dict)  # by source: key of its only response, rows

    def look(self, source: str, batch: ExampleBatch, special: re.Pattern[bytes] | None) -> None:
        """Check consecutive examples of a source; `special` matches strings of special tokens inside texts."""
        texts = batch.texts
        if parts := broken_latex(texts):
            self.add_texts(LATEX, batch, (any(part in text for part in parts) for text in texts.utf8))
        self.add_texts(REPLACEMENT, batch, (texts.kinds & LOST) != 0)
        if special and special.search(texts.joined):
            self.add_texts(SPECIAL, batch, (bool(special.search(text)) for text in texts.utf8))
        some = np.diff(texts.ends, prepend=0) > 1  # empty: the prefix of a document, or a bad row
        self.add_texts(BLANK, batch, some & ((texts.kinds & VISIBLE) == 0))
        for i in _echoes(texts):
            self.add(ECHO, batch.place(i))
        self.add_texts(DECOMPOSED, batch, texts.not_nfc)
        if (texts.kinds[~texts.not_nfc] & PRECOMPOSED).any():
            self.counts[COMPOSED] += 1  # only zero or non-zero matters
        if responses := texts.utf8[1::2]:
            same = all(response == responses[0] for response in responses)
            self._add_responses(source, _key(responses[0]) if same else "", len(responses))

    def add(self, kind: str, place: str, count: int = 1) -> None:
        self.counts[kind] += count
        self.first.setdefault(kind, place)

    def add_texts(self, kind: str, batch: ExampleBatch, found: np.ndarray | Iterable[bool]) -> None:
        """Count the texts of a batch for which `found` is true."""
        for i in np.flatnonzero(found if isinstance(found, np.ndarray) else list(found)).tolist():
            self.add(kind, f"{batch.place(i // 2)} ({('instruction', 'response')[i % 2]})")

    def _add_responses(self, source: str, key: str, rows: int) -> None:
        before, count = self.responses.get(source, (key, 0))
        self.responses[source] = (key if key == before else "", count + rows)

    def merge(self, later: Lint) -> None:
        """Add what was found in later files."""
        self.counts += later.counts
        self.first = {**later.first, **self.first}
        for source, (key, rows) in later.responses.items():
            self._add_responses(source, key, rows)

    def lines(self, whole: bool = True) -> list[str]:
        """Return one line for each kind found; `whole`: all of the sources has been read."""
        shown = [kind for kind in MEANINGS if self.counts[kind]]
        if not self.counts[COMPOSED] and DECOMPOSED in shown:
            shown.remove(DECOMPOSED)
        constant = [f"lint: all {rows:,} responses of {source} are the same; leave it out unless that is to be learned"
                    for source, (key, rows) in self.responses.items() if whole and key and rows >= CONSTANT_FROM]
        return [f"lint: {self.counts[kind]:,} {MEANINGS[kind]}. First {self.first[kind]}" for kind in shown] + constant

    def refuse(self, whole: bool = True) -> None:
        """Raise ConfigError if anything was found."""
        if lines := self.lines(whole):
            raise ConfigError(f"{'; '.join(lines)}. --lint warn writes them all the same")

    def to_json(self) -> dict[str, Any]:
        counts = {kind: count if kind != COMPOSED else 1 for kind, count in sorted(self.counts.items()) if count}
        return dict(counts=counts, first=dict(sorted(self.first.items())),
                    responses={source: list(found) for source, found in self.responses.items()})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Lint:
        return cls(Counter(value["counts"]), dict(value["first"]),
                   {source: (key, rows) for source, (key, rows) in value["responses"].items()})


def broken_latex(texts: Texts) -> set[bytes]:
    """Return the members of BROKEN_LATEX that occur in the texts."""
    if not (texts.kinds & CONTROL).any():
        return set()
    from hrm_megatron.data.character_kernels import places_of_triples  # late: numba takes half a second
    begun = places_of_triples(texts.octets, _BEGINNINGS, FIRST_CONTROL).tolist()
    return {part for start in begun for part in BROKEN_LATEX if texts.joined.startswith(part, start)}


def _echoes(texts: Texts) -> list[int]:
    """Return the indices of examples whose two texts are equal up to surrounding whitespace."""
    starts, ends = texts.stripped.T
    lengths = ends - starts
    return [i for i in np.flatnonzero(lengths[::2] == lengths[1::2]).tolist()
            if texts.joined[starts[2 * i]:ends[2 * i]] == texts.joined[starts[2 * i + 1]:ends[2 * i + 1]]]


def _key(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=8).hexdigest()
