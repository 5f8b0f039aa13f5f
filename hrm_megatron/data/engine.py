"""Encode texts to the ids of the tokenizers library: by that library, or by gigatoken where both provably agree.

Both split a text by one regular expression and merge the bytes of each piece by one table. They can differ in how they
classify a character, in how they normalize, and in tokens that occur inside a text. So gigatoken only gets texts

- that are already in NFC, or were normalized by the tokenizer's own normalizer. A text in the normal form of a later
  Unicode is also in that of an earlier one, because normal forms are stable;
- of code points that this Python's Unicode assigns. The expression depends on a character only through its class, and
  for these code points both libraries have the same classes, which a test checks for every one of them;
- cut at the tokens that may occur in a text, as tokenizers cuts them before anything else.

Tokenizers encodes all other texts, and all texts of a tokenizer that is built otherwise.
"""
from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from hrm_megatron.config import ConfigError
from hrm_megatron.data.characters import UNASSIGNED, Texts

ENGINES = ("auto", "tokenizers", "gigatoken")
GIGATOKEN = "0.10.0"  # the version whose character classes were compared
_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLIT_PATTERN = _SPLIT % ""  # Qwen's, with single digits
PATTERNS = (SPLIT_PATTERN, _SPLIT % "{1,3}")  # whose character classes were compared
CHECKED_UNICODE = 16  # the major version of Unicode up to which the classes agree
BATCH_CHARACTERS = 1 << 18  # per call of tokenizers, which needs some hundred bytes per token
CHECKED_TEXTS = 4096  # one in this many of gigatoken's texts is also encoded by tokenizers
CHECKED_CHARACTERS = 1 << 14  # longer texts are not checked
CACHE_BYTES = 1 << 28  # gigatoken caches every piece that it has seen; it is rebuilt once memory has grown by this
SPACES = "\t\n\r \x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\ufeff"
SAMPLE = (  # both must encode these alike when a tokenizer is opened
    "", " ", "It's what I'LL say; we'Ve 2024 !!\r\n\n  two  spaces \t", "\u017f'\u017f 'S K\u212a",
    "\u00e9 \u4f60\u597d 12",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2167\u00bd\u2460", "x" * 300, "=" * 300,
    *(f"a{s}{s}b {s}\n{s}!{s}" for s in SPACES),
    "<|im_start|><think></think><|PAD|>", "\\boxed{\\frac{1}{2}}\x08oxed\x0crac",
)

log = logging.getLogger(__name__)


class Ragged(NamedTuple):
    """Concatenated ids of several texts."""

    ids: np.ndarray  # [sum of lengths] int32
    lengths: np.ndarray  # [texts] int64

    def rows(self) -> list[list[int]]:
        return [row.tolist() for row in np.split(self.ids, self.lengths.cumsum()[:-1])] if len(self.lengths) else []


class Engine(Protocol):
    name: str
    guarded: int  # of `texts`, those that the guard left to tokenizers
    texts: int

    def encode(self, texts: Sequence[str]) -> Ragged: ...


class TokenizersEngine:
    """The tokenizers library itself. Its cache holds at most 10,000 pieces, none of more than 256 bytes."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts = self.guarded = 0

    def encode(self, texts: Sequence[str]) -> Ragged:
        self.texts += len(texts)
        self.guarded += len(texts)
        ids: list[np.ndarray] = []
        lengths: list[int] = []
        batch: list[str] = []
        characters = 0
        for i, text in enumerate(texts, start=1):
            batch.append(text)
            characters += len(text)
            if characters >= BATCH_CHARACTERS or i == len(texts):
                encoded = [encoding.ids for encoding in
                           self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
                ids += [np.array(row, np.int32) for row in encoded]
                lengths += map(len, encoded)
                batch, characters = [], 0
        return Ragged(np.concatenate(ids) if ids else np.empty(0, np.int32), np.array(lengths, np.int64))


class Disagreement(ConfigError):
    """The ids of the two libraries differ: a bug in the guard, or a library that has changed."""


@dataclass(frozen=True)
class TextTokens:
    """Tokens that may occur inside a text: a pattern of all added tokens, and the ids of those that count."""

    pattern: re.Pattern[str]
    ids: dict[str, int]

    @classmethod
    def of(cls, added: Sequence[dict[str, Any]]) -> TextTokens | None:
        """Read the added tokens of a tokenizer.json; special ones get no id, as encode_special_tokens requires."""
        ids = {token["content"]: token["id"] for token in added if not token["special"]}
        if not ids:
            return None
        # Leftmost match; among tokens that begin there, the longest.
        contents = sorted((token["content"] for token in added), key=len, reverse=True)
        return cls(re.compile("|".join(map(re.escape, contents))), ids)

    def cut(self, text: str) -> tuple[list[str], list[int]]:
        """Return the texts between the tokens (one more than there are tokens), and the ids of the tokens."""
        between, ids, start = [], [], 0
        for match in self.pattern.finditer(text):
            if (token := self.ids.get(match.group())) is not None:
                between.append(text[start:match.start()])
                ids.append(token)
                start = match.end()
        return [*between, text[start:]], ids


class GigatokenEngine:
    """gigatoken behind the guard described at the top of this file."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
        """Raises ValueError with the reason if gigatoken cannot replace tokenizers for this tokenizer."""
        if reason := unsupported(config):
            raise ValueError(reason)
        # Optional dependency, imported only here.
        from gigatoken import Tokenizer as Gigatoken
        # Special tokens stay in the vocabulary, but no merge produces them, and texts are never searched for them.
        contents = json.dumps(dict(config, added_tokens=[], normalizer=None, post_processor=None, decoder=None,
                                   truncation=None, padding=None))
        self._build = lambda: Gigatoken.from_json(contents)
        self._gigatoken = self._build()
        self._slow = TokenizersEngine(tokenizer)
        self._normalizer = tokenizer.normalizer
        self._tokens = TextTokens.of(config["added_tokens"])
        self._memory = resident_bytes()
        self.texts = self.guarded = 0
        self._check(SAMPLE, self.encode(SAMPLE).rows())
        self.texts = self.guarded = 0

    def encode(self, texts: Sequence[str]) -> Ragged:
        if not self._tokens or not (held := self._with_tokens(texts)):
            return self._encode(texts)
        # Encode the stretches between tokens, then insert the ids of the tokens at their borders.
        flat: list[str] = []
        inserted: list[int] = []
        after: list[int] = []
        counts = np.ones(len(texts), np.int64)
        for i, text in enumerate(texts):
            between, ids = held.get(i, ([text], []))
            after += range(len(flat) + 1, len(flat) + 1 + len(ids))
            flat += between
            counts[i] = len(between)
            inserted += ids
        encoded = self._encode(flat)
        ends = np.concatenate([[0], encoded.lengths.cumsum()])
        last = counts.cumsum()
        lengths = np.diff(ends[np.concatenate([[0], last])]) + counts - 1
        woven = np.insert(encoded.ids, ends[after].astype(np.int64), inserted)
        return Ragged(woven.astype(np.int32, copy=False), lengths)

    def _with_tokens(self, texts: Sequence[str]) -> dict[int, tuple[list[str], list[int]]]:
        assert self._tokens
        return {i: cut for i, text in enumerate(texts)
                if self._tokens.pattern.search(text) and (cut := self._tokens.cut(text))[1]}

    def _encode(self, texts: Sequence[str]) -> Ragged:
        """Encode texts that contain no such token."""
        before = self.texts
        self.texts += len(texts)
        texts = Texts.of(texts)
        spelled = list(texts.utf8)
        refused = unassigned(texts)
        if self._normalizer and (others := np.flatnonzero(texts.not_nfc).tolist()):
            normal = Texts.of(self._normalizer.normalize_str(texts[i]) for i in others)
            for i, text in zip(others, normal.utf8, strict=True):
                spelled[i] = text
            refused = sorted({*refused}.difference(others).union(others[i] for i in unassigned(normal)))
        self.guarded += len(refused)
        for i in refused:
            spelled[i] = b""
        encoded = self._trusted(spelled)
        for i in range(-before % CHECKED_TEXTS, len(texts), CHECKED_TEXTS):
            if len(texts[i]) <= CHECKED_CHARACTERS and i not in refused:
                start = int(encoded.lengths[:i].sum())
                self._check([texts[i]], [encoded.ids[start:start + int(encoded.lengths[i])].tolist()])
        if refused:
            encoded = _put(encoded, refused, self._slow.encode([texts[i] for i in refused]))
        if resident_bytes() - self._memory > CACHE_BYTES:
            del self._gigatoken  # free it before building the next one
            self._gigatoken = self._build()
            self._memory = resident_bytes()
        return encoded

    def _trusted(self, texts: list[bytes]) -> Ragged:
        layout = self._gigatoken.encode_batch(texts, parallel=False).layout
        ids, ends = np.asarray(layout.content.data), np.asarray(layout.offsets.data)
        return Ragged(ids[ends[0]:ends[-1]].view(np.int32), np.diff(ends))

    def _check(self, texts: Sequence[str], have: list[list[int]]) -> None:
        for text, ids, want in zip(texts, have, self._slow.encode(texts).rows(), strict=True):
            if ids != want:
                raise Disagreement(f"gigatoken spells {text[:200]!r} otherwise than tokenizers; choose "
                                   "--tokenizer-engine tokenizers, and please report this text")


def _put(encoded: Ragged, places: Sequence[int], rows: Ragged) -> Ragged:
    """Insert `rows` at the ascending `places`, whose texts have no ids yet."""
    lengths = encoded.lengths.copy()
    lengths[places] = rows.lengths
    between = np.split(encoded.ids, encoded.lengths.cumsum()[places])
    theirs = np.split(rows.ids, rows.lengths.cumsum()[:-1])
    return Ragged(np.concatenate([part for pair in zip(between, theirs, strict=False) for part in pair]
                                 + between[-1:]), lengths)


def unassigned(texts: Sequence[str]) -> list[int]:
    """Return the indices of texts that contain a code point which the guard does not admit."""
    found: list[int] = np.flatnonzero(Texts.of(texts).kinds & UNASSIGNED).tolist()
    return found


def unsupported(config: dict[str, Any]) -> str | None:
    """Return why the guard's argument does not hold for a tokenizer.json; None if it holds."""
    if int(unicodedata.unidata_version.split(".")[0]) > CHECKED_UNICODE:
        return f"this Python knows Unicode {unicodedata.unidata_version}, which was not compared"
    model = dict(config["model"])
    vocabulary = model.pop("vocab")
    model.pop("merges", None)
    if (kind := model.pop("type", None)) != "BPE" or any(model.values()):
        settings = [f"{key}={value}" for key, value in model.items() if value and kind == "BPE"]
        return f"its model is not plain BPE ({', '.join(settings) or kind})"
    if any(byte not in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet()):
        return "some bytes have no token"
    if config["normalizer"] not in (None, {"type": "NFC"}):
        return f"its normalizer is {config['normalizer'].get('type')}"
    steps = (config["pre_tokenizer"] or {}).get("pretokenizers", [])
    if len(steps) != 2 or [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return "its pre-tokenizer is not one Split and ByteLevel"
    split, byte_level = steps
    if split["pattern"].get("Regex") not in PATTERNS or split["behavior"] != "Isolated" or split["invert"]:
        return "it splits by another expression"
    if byte_level["add_prefix_space"] or byte_level["use_regex"]:
        return "ByteLevel changes or splits the text once more"
    if any(not token["special"] for token in config["added_tokens"]) and any(
            token["normalized"] or token["lstrip"] or token["rstrip"] or token["single_word"]
            for token in config["added_tokens"]):
        return "tokens that stand in a text depend on what is around them"
    return None


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0  # not Linux: the cache is unbounded


def open_engine(choice: str, tokenizer: Tokenizer, config: dict[str, Any]) -> Engine:
    """Return the fast engine unless it is not asked for, not installed or not proven equal for this tokenizer."""
    if choice == "tokenizers":
        return TokenizersEngine(tokenizer)
    try:
        version = metadata.version("gigatoken")
        if version != GIGATOKEN:
            raise ValueError(f"it is {version}, and {GIGATOKEN} was compared")
        return GigatokenEngine(tokenizer, config)
    except metadata.PackageNotFoundError:
        reason = "it is not installed: pip install 'hrm_megatron[tokenize]'"
    except (ImportError, ValueError, Disagreement) as error:
        reason = str(error)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a Rust panic, which is not an Exception
            raise
        reason = str(error)
    level = logging.INFO if choice == "auto" else logging.WARNING
    log.log(level, "tokenizers spells the texts, not gigatoken: %s", " ".join(reason.split()))
    return TokenizersEngine(tokenizer)
