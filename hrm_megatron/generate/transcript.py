"""One answer while it grows: its tokens, its text as far as it is final, and why it ends."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Decode = Callable[[Sequence[int]], str]  # tokens > text; special tokens have none
Finish = Literal["stop", "length", "cancelled", "failed"]  # failed: its logits are not finite
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a chosen token and of the likeliest ones: the model's, before temperature and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Transcript:
    """An answer. Text that may still turn out to be the beginning of a stop string, or of a character, is held back."""

    stop_tokens: frozenset[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    decode: Decode | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""  # without stop string
    h_cycles: int | None = None  # that its tokens run, where early exit decides it
    finish: Finish | None = None
    _decoded: int = 0  # tokens whose text is in `_pending` or out
    _context: int = 0  # of these the first that is decoded with those behind it
    _pending: str = ""  # decoded, and perhaps the beginning of a stop string

    def push(self, token: int) -> str:
        """Add a token and return the text that became final; `finish` says whether that was the last."""
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
        """Decode what has not been. A token of SentencePiece has no space at the beginning of a text, so that one with
        text goes before it."""
        before = decode(self.tokens[self._context:self._decoded])
        if before.endswith(UNFINISHED):  # a token that was given ends in half a character
            self._context, before = self._decoded, ""
        return decode(self.tokens[self._context:])[len(before):]

    def give(self, token: int) -> str:
        """Add a token that was not chosen: it ends nothing but the room there is, and its text is not the answer's."""
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
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
