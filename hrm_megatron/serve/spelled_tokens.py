"""Text and bytes of single tokens, for logprobs."""
from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import decoders, pre_tokenizers

from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.generate.transcript import TokenLogprob

FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's token for one byte of a character without a token


def byte_alphabet() -> dict[str, int]:
    """Return the character > byte map of byte-level BPE (GPT-2's): printable Latin-1 stands for itself, the other bytes
    follow from U+0100 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    assert found.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return found


class TextOffsets:
    """Text offsets of tokens in the decoded text, in which invalid bytes are U+FFFD. The first `echoed` tokens are
    decoded separately."""

    def __init__(self, echoed: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0  # complete ones
        self._echoed = echoed  # echoed tokens still to come

    def take(self, data: bytes) -> int:
        """Add the next token's bytes and return the offset of the character that contains the first of them."""
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
    """Gives the text and bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        byte_level = isinstance(tokenizer.tokenizer.decoder, decoders.ByteLevel)
        self.alphabet = byte_alphabet() if byte_level else {}
        self.added = {token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values()}
        # Other tokenizers may decode a first token differently, so tokens are decoded after one with text.
        ids = () if byte_level else range(tokenizer.vocab_size)
        self.before = next(([i] for i in ids if tokenizer.decode([i]).isalnum()), [])
        self.characters_before = len(tokenizer.decode(self.before))

    def bytes_of(self, token: int) -> bytes:
        name = self.tokenizer.tokenizer.id_to_token(token)
        if name is None:
            return b""  # an embedding row without a token
        if name in self.added:
            return str(name).encode()
        if self.alphabet:
            known = all(character in self.alphabet for character in name)
            return bytes(self.alphabet[character] for character in name) if known else str(name).encode()
        if byte := FALLBACK.fullmatch(name):
            return bytes.fromhex(byte[1])
        return self.tokenizer.decode([*self.before, token])[self.characters_before:].encode()

    def text_of(self, token: int) -> str:
        """Return the token's text; bytes that are not UTF-8 are written as in OpenAI's API."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat_logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the logprobs of a piece of a chat answer."""
        def one(token: int, logprob: float) -> dict[str, Any]:
            return dict(token=self.text_of(token), logprob=logprob, bytes=list(self.bytes_of(token)))
        return dict(content=[dict(one(each.token, each.logprob), top_logprobs=[one(*top) for top in each.top])
                             for each in found], refusal=None)

    def completion_logprobs(self, prefix: Iterable[int], found: Sequence[TokenLogprob],
                            offsets: TextOffsets) -> dict[str, Any]:
        """Return the logprobs of a piece of a completion. Tokens of an echoed `prefix` have none.

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
        """Return logprobs by text, likeliest first; of tokens with the same text only the likeliest is kept."""
        found: dict[str, float] = {}
        for token, logprob in top:
            found.setdefault(self.text_of(token), logprob)
        return found

    def _text_bytes(self, token: int) -> bytes:
        """Return a token's bytes in the decoded text, where control tokens have none."""
        if self.tokenizer.tokenizer.id_to_token(token) in self.added:
            return self.tokenizer.decode([token]).encode()
        return self.bytes_of(token)
