"""One answer during generation: its tokens, the text that is final, and why it ended."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Decode = Callable[[Sequence[int]], str]  # tokens > text; special tokens have none
Finish = Literal["stop", "length", "cancelled", "failed"]  # failed: its logits are not finite
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # an incomplete UTF-8 sequence decodes to this


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities of the chosen token and of the likeliest ones, from the raw logits (before temperature and
    filters)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Transcript:
    """An answer. Text that may be the beginning of a stop string or of a multi-byte character is held back."""

    stop_tokens: frozenset[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    decode: Decode | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""  # without stop string
    h_cycles: int | None = None  # run by its tokens; set with early exit
    finish: Finish | None = None
    _decoded: int = 0  # tokens whose text is in `_pending` or released
    _context: int = 0  # the first of these that is decoded with the later ones
    _pending: str = ""  # decoded, but maybe the beginning of a stop string

    def push(self, token: int) -> str:
        """Add a token and return the text that became final; `finish` is set if it was the last one."""
        self.tokens.append(token)
        ended = token in self.stop_tokens
        if ended:
            self.finish = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish = "length"
        if self.decode is None:
            return ""
        text = self._text_behind(self.decode)
        if not text.endswith(UNFINISHED) or self.finish:
            if text:
                self._context = self._decoded
            self._decoded, self._pending = len(self.tokens), self._pending + text
        return self._release()

    def _text_behind(self, decode: Decode) -> str:
        """Return the text of tokens not decoded yet. They are decoded after an earlier token with text, since
        SentencePiece drops the space of a first token."""
        before = decode(self.tokens[self._context:self._decoded])
        if before.endswith(UNFINISHED):  # a given token ends inside a character
            self._context, before = self._decoded, ""
        return decode(self.tokens[self._context:])[len(before):]

    def give(self, token: int) -> str:
        """Add a given token: it can end the answer only by length, and its text is not part of the answer."""
        self.tokens.append(token)
        self._decoded = len(self.tokens)
        if len(self.tokens) >= self.max_new_tokens:
            self.finish = "length"
        return ""

    def _release(self) -> str:
        starts = [start for stop in self.stop if (start := self._pending.find(stop)) >= 0]
        if starts:
            piece, self._pending, self.finish = self._pending[:min(starts)], "", "stop"
        else:
            held = 0 if self.finish else max((_overlap(self._pending, stop) for stop in self.stop), default=0)
            piece = self._pending[:len(self._pending) - held]
            self._pending = self._pending[len(piece):]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
