"""Continuous batching: answers join and leave the batch between two tokens, and a free row is refilled at once.

An answer depends on its prompt, its sampling and the weights, not on the rest of the batch: it has its own random
generator, and no operation mixes rows. Only rounding depends on the batch: BLAS may sum in another order for another
number of rows, so logits agree to rounding, not bitwise, between batch sizes.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hrm_megatron.config import ConfigError
from hrm_megatron.generate.cache import BLOCK_TOKENS, PagedCache, blocks_of
from hrm_megatron.generate.decoder import Decoder
from hrm_megatron.generate.sampling import Sampling, choose, random_numbers
from hrm_megatron.generate.transcript import Decode, TokenLogprob, Transcript

# Most prompt tokens per prefill; a longer prompt is read alone. On a CPU: as many as its caches hold states of.
PREFILL_TOKENS = {"cuda": 4096, "cpu": 1024}


@dataclass(frozen=True)
class Request:
    """A prompt; its `samples` answers share one prefill.

    `logprobs` None: none; else those of the chosen token and of this many top tokens. `stream` separates the random
    numbers of prompts with the same seed. Each answer begins with the tokens `given`, which are not sampled and not
    counted in `max_new_tokens`. They have logprobs too, so a continuation is scored by passing it as `given`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    samples: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    stream: int = 0
    given: Sequence[int] = ()


@dataclass(frozen=True)
class Progress:
    """The effect of one more token of an answer."""

    request: int  # number from `Engine.submit`
    sample: int
    piece: str  # text that became final
    transcript: Transcript

    def check(self) -> None:
        """Raise ConfigError if the answer has failed."""
        if self.transcript.finish == "failed":
            raise ConfigError("logits of the model are not finite; its weights are damaged")


@dataclass(eq=False)
class _Waiting:
    """A request with samples that have not begun; once prefilled it holds the `blocks` of its prompt."""

    number: int
    request: Request
    limit: int  # most tokens of an answer, given ones included
    blocks: list[int] = field(default_factory=list)
    logits: torch.Tensor | None = None  # [v], of the first token
    likeliest: int | None = None  # argmax of the logits; None: not finite
    h_cycles: int | None = None  # of its answers, with early exit only
    begun: int = 0

    @property
    def own_blocks(self) -> int:
        """Blocks that a sample does not share: all but the full ones of the prompt. The last token is never cached."""
        return blocks_of(len(self.request.prompt) + self.limit - 1) - len(self.request.prompt) // BLOCK_TOKENS


@dataclass(eq=False)
class _Running:
    number: int
    sample: int
    request: Request
    transcript: Transcript
    random: np.random.Generator
    blocks: list[int]
    promised: int  # blocks still reserved for it
    length: int  # positions in the cache


def blocks_needed(prompt_tokens: int, new_tokens: int) -> int:
    """Return the blocks that suffice for one answer, including its copy of the prompt's last, partly filled block."""
    return blocks_of(prompt_tokens + new_tokens - 1) + bool(prompt_tokens % BLOCK_TOKENS)


class Engine:
    """Answers requests, `max_rows` at once, in the order of `submit`; call `step` until it is `idle`."""

    def __init__(self, decoder: Decoder, cache: PagedCache, max_rows: int, decode_text: Decode | None = None,
                 prefill_tokens: int | None = None) -> None:
        if max_rows < 1:
            raise ConfigError(f"batch size {max_rows}: must be at least 1")
        self.decoder, self.cache, self.max_rows = decoder, cache, max_rows
        self.decode_text, self.prefill_tokens = decode_text, prefill_tokens or PREFILL_TOKENS[decoder.device.type]
        self.waiting: deque[_Waiting] = deque()
        self.running: list[_Running] = []
        self._promised, self._submitted = 0, 0
        decoder.prepare(max_rows, cache.size.bytes)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def check(self, request: Request) -> int:
        """Return the most tokens that an answer to `request` may have, given ones included; raises ConfigError if it
        cannot be answered."""
        tokens, context = len(request.prompt), self.decoder.context_tokens
        known = tokens + len(request.given)
        if not tokens:
            raise ConfigError("empty prompt: give at least one token")
        # Scoring only given tokens needs no room for a new one: the last is never read.
        least = 0 if request.given else 1
        if request.max_new_tokens < least or request.samples < 1:
            raise ConfigError(f"max_new_tokens={request.max_new_tokens}, samples={request.samples}: must be at least 1")
        if known + min(request.max_new_tokens, 1) > context:
            raise ConfigError(f"prompt of {known} tokens leaves no room for an answer in the model's context of "
                              f"{context}; shorten it")
        if request.stop and (self.decode_text is None or not all(request.stop)):
            raise ConfigError(f"stop={request.stop}: stop strings need a tokenizer and must not be empty")
        limit = min(len(request.given) + request.max_new_tokens, context - tokens)
        if (needed := blocks_needed(tokens, limit)) > self.cache.size.blocks:
            raise ConfigError(f"prompt of {tokens} tokens and an answer of {limit} need {needed} blocks of the key-"
                              f"value cache, which has {self.cache.size.blocks}; lower max_new_tokens")
        return limit

    def longest_answer(self, prompt_tokens: int) -> int:
        """Return the most tokens, given ones included, that context and cache allow for an answer; below 1: none."""
        blocks = self.cache.size.blocks - bool(prompt_tokens % BLOCK_TOKENS)
        return min(self.decoder.context_tokens, blocks * BLOCK_TOKENS + 1) - prompt_tokens

    def submit(self, request: Request) -> int:
        """Queue a request and return its number; raises ConfigError if it can never be answered."""
        self.waiting.append(_Waiting(self._submitted, request, self.check(request)))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, number: int) -> None:
        """Cancel a request; its rows and blocks are free for the next step."""
        for waiting in [waiting for waiting in self.waiting if waiting.number == number]:
            self.waiting.remove(waiting)
            self._forget_prompt(waiting)
        for row in [row for row in self.running if row.number == number]:
            row.transcript.finish = "cancelled"
            self._leave(row)

    def step(self) -> list[Progress]:
        """Add a token to every running answer, then start as many waiting answers as there is room for.

        Neither starves the other, even if requests whose answers end at the first token keep arriving. An answer with
        non-finite logits fails without affecting others.
        """
        return self._advance() + self._begin()

    def _fits(self, blocks: int) -> bool:
        return blocks <= self.cache.free - self._promised

    def _begin(self) -> list[Progress]:
        room = self.max_rows - len(self.running)
        starting: list[tuple[_Waiting, int]] = []
        read: list[_Waiting] = []
        for waiting in self.waiting:
            new = not waiting.blocks
            prompt_blocks = blocks_of(len(waiting.request.prompt)) if new else 0
            tokens = sum(len(other.request.prompt) for other in read) + len(waiting.request.prompt)
            if not room or not self._fits(prompt_blocks + waiting.own_blocks) or (
                    new and read and tokens > self.prefill_tokens):
                break
            waiting.blocks = waiting.blocks or [self.cache.take() for _ in range(prompt_blocks)]
            read += [waiting] * new
            count = 0
            while waiting.begun + count < waiting.request.samples and room and self._fits(waiting.own_blocks):
                self._promised += waiting.own_blocks
                count, room = count + 1, room - 1
            starting.append((waiting, count))
            if waiting.begun + count < waiting.request.samples:
                break
        if read:
            found = self.decoder.prefill([waiting.request.prompt for waiting in read],
                                         [np.asarray(waiting.blocks, np.int32) for waiting in read], self.cache)
            for place, (waiting, likeliest) in enumerate(zip(read, _likeliest(found.logits), strict=True)):
                waiting.logits, waiting.likeliest = found.logits[place], likeliest
                waiting.h_cycles = None if found.h_cycles is None else int(found.h_cycles[place])
        return [self._first_token(waiting) for waiting, count in starting for _ in range(count)]

    def _first_token(self, waiting: _Waiting) -> Progress:
        request, sample = waiting.request, waiting.begun
        full = len(request.prompt) // BLOCK_TOKENS
        blocks = [self.cache.share(block) for block in waiting.blocks[:full]]
        blocks += [self.cache.copy(block) for block in waiting.blocks[full:]]  # partly filled: the answer writes to it
        promised = waiting.own_blocks - (len(blocks) - full)
        self._promised -= len(blocks) - full
        waiting.begun += 1
        row = _Running(waiting.number, sample, request, Transcript(
            request.stop_tokens, waiting.limit, request.stop, self.decode_text, h_cycles=waiting.h_cycles),
            random_numbers(request.sampling.seed, request.stream, sample), blocks, promised, len(request.prompt))
        self.running.append(row)
        assert waiting.logits is not None
        if waiting.begun == request.samples:
            self.waiting.remove(waiting)
            self._forget_prompt(waiting)
        return self._accept(row, waiting.logits, waiting.likeliest)

    def _advance(self) -> list[Progress]:
        if not self.running:
            return []
        rows = list(self.running)
        for row in rows:
            if row.length == len(row.blocks) * BLOCK_TOKENS:
                row.blocks.append(self.cache.take())
                row.promised -= 1
                self._promised -= 1
        tables = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int32)
        for table, row in zip(tables, rows, strict=True):
            table[:len(row.blocks)] = row.blocks
            table[len(row.blocks):] = row.blocks[0]  # a block of its own: another's may hold NaN, and 0 * NaN is NaN
        cycles = [row.transcript.h_cycles for row in rows if row.transcript.h_cycles is not None]  # all rows or none
        logits = self.decoder.decode([row.transcript.tokens[-1] for row in rows],
                                     np.asarray([row.length for row in rows], np.int32), tables, self.cache,
                                     np.asarray(cycles, np.int32) if cycles else None)
        for row in rows:
            row.length += 1
        return [self._accept(row, *each) for row, *each in zip(rows, logits, _likeliest(logits), strict=True)]

    def _accept(self, row: _Running, logits: torch.Tensor, likeliest: int | None) -> Progress:
        """Choose the next token of a row from logits [v]; `likeliest` is their argmax, None if they are not finite."""
        sampling, transcript, given = row.request.sampling, row.transcript, row.request.given
        if likeliest is None:
            transcript.finish = "failed"
            self._leave(row)
            return Progress(row.number, row.sample, "", transcript)
        is_given = len(transcript.tokens) < len(given)
        if is_given:
            token = given[len(transcript.tokens)]
        else:
            token = choose(logits, sampling, row.random.random()) if sampling.temperature else likeliest
        if row.request.logprobs is not None:
            transcript.logprobs.append(_logprob(logits, token, row.request.logprobs))
        piece = transcript.give(token) if is_given else transcript.push(token)
        if transcript.finish:
            self._leave(row)
        return Progress(row.number, row.sample, piece, transcript)

    def _leave(self, row: _Running) -> None:
        self.running.remove(row)
        self._promised -= row.promised
        for block in row.blocks:
            self.cache.release(block, row.transcript.finish == "failed")

    def _forget_prompt(self, waiting: _Waiting) -> None:
        for block in waiting.blocks:
            self.cache.release(block, waiting.likeliest is None)

    def answer(self, requests: Sequence[Request],
               on_progress: Callable[[Progress], object] = lambda progress: None) -> list[list[Transcript]]:
        """Answer all requests and return the samples of each."""
        numbers = [self.submit(request) for request in requests]
        found: dict[int, dict[int, Transcript]] = {number: {} for number in numbers}
        while not self.idle:
            for progress in self.step():
                progress.check()
                found[progress.request][progress.sample] = progress.transcript
                on_progress(progress)
        return [[found[number][sample] for sample in range(request.samples)]
                for number, request in zip(numbers, requests, strict=True)]


def _likeliest(logits: torch.Tensor) -> list[int | None]:
    """Return the argmax of each row of logits [n, v], None where they are not finite."""
    largest, tokens = logits.max(-1)  # NaN if any is NaN
    return [token if finite else None
            for token, finite in zip(tokens.tolist(), largest.isfinite().tolist(), strict=True)]


def _logprob(logits: torch.Tensor, token: int, count: int) -> TokenLogprob:
    logprobs = logits.double().log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprob(token, logprobs[token].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
