"""Tokens as text and bytes, one at a time: what logprobs name them by."""
from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import decoders, pre_tokenizers

from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.generate.transcript import TokenLogprob

FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece calls a byte of a character that is no token


def byte_alphabet() -> dict[str, int]:
    """The characters by which a byte-level BPE writes bytes (GPT-2's): printable Latin-1 is itself, the others follow
    from U+0100 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    assert found.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return found


class TextOffsets:
    """Where tokens begin in the text that their bytes become: bytes that are no text are U+FFFD there. The text of the
    first `echoed` tokens is decoded alone."""

    def __init__(self, echoed: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0  # that are complete
        self._echoed = echoed  # tokens that are still to come

    def take(self, data: bytes) -> int:
        """Return the place of the character that the next token's first byte is part of."""
        if not self._echoed:
            self._characters += len(self._decoder.decode(b"", final=True))
        self._echoed -= 1
        place = self._characters
        for number in range(len(data)):
            self._characters += len(self._decoder.decode(data[number:number + 1]))
            if not number:
                place = self._characters - (not self._decoder.getstate()[0])
        return place


class TokenSpelling:
    """Names tokens of one tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        byte_level = isinstance(tokenizer.tokenizer.decoder, decoders.ByteLevel)
        self.alphabet = byte_alphabet() if byte_level else {}
        self.added = {token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values()}
        # Others may decode a token to another text where it is the first, so that one with text is put before it.
        ids = () if byte_level else range(tokenizer.vocab_size)
        self.before = next(([i] for i in ids if tokenizer.decode([i]).isalnum()), [])
        self.characters_before = len(tokenizer.decode(self.before))

    def bytes_of(self, token: int) -> bytes:
        name = self.tokenizer.tokenizer.id_to_token(token)
        if name is None:
            return b""  # a row of the embedding that no token has
        if name in self.added:
            return str(name).encode()
        if self.alphabet:
            known = all(character in self.alphabet for character in name)
            return bytes(self.alphabet[character] for character in name) if known else str(name).encode()
        if byte := FALLBACK.fullmatch(name):
            return bytes.fromhex(byte[1])
        return self.tokenizer.decode([*self.before, token])[self.characters_before:].encode()

    def text_of(self, token: int) -> str:
        """The token's text; bytes that are none are written as OpenAI's API does."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat_logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Spell the logprobs of a piece of a chat's answer."""
        def one(token: int, logprob: float) -> dict[str, Any]:
            return dict(token=self.text_of(token), logprob=logprob, bytes=list(self.bytes_of(token)))
        return dict(content=[dict(one(each.token, each.logprob), top_logprobs=[one(*top) for top in each.top])
                             for each in found], refusal=None)

    def completion_logprobs(self, prefix: Iterable[int], found: Sequence[TokenLogprob],
                            offsets: TextOffsets) -> dict[str, Any]:
        """Spell the logprobs of a piece of a completion. Tokens of an echoed `prefix` have none.

        `offsets` has seen the tokens before the piece.
        """
        tokens = [*prefix]
        before = len(tokens)
        tokens += [each.token for each in found]
        return dict(
            tokens=[self.text_of(token) for token in tokens],
            token_logprobs=[None] * before + [each.logprob for each in found],
            top_logprobs=[None] * before + [self._by_text(each.top) for each in found],
            text_offset=[offsets.take(self._text_bytes(token)) for token in tokens])

    def _by_text(self, top: Iterable[tuple[int, float]]) -> dict[str, float]:
        """Logprobs by text, the likeliest first, which also speaks for others of the same text."""
        found: dict[str, float] = {}
        for token, logprob in top:
            found.setdefault(self.text_of(token), logprob)
        return found

    def _text_bytes(self, token: int) -> bytes:
        """A token's bytes in the text, in which control tokens have none."""
        if self.tokenizer.tokenizer.id_to_token(token) in self.added:
            return self.tokenizer.decode([token]).encode()
        return self.bytes_of(token)
