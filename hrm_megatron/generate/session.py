"""A model with its tokenizer, ready to answer, and the JSON records of answers, as tools/generate.py writes them."""
from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hrm_megatron.config import ConfigError
from hrm_megatron.data.spelling import tags_of
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.generate.cache import CacheSize, PagedCache, free_bytes
from hrm_megatron.generate.decoder import Decoder
from hrm_megatron.generate.engine import Engine, Progress, Request, blocks_needed
from hrm_megatron.generate.load import Fingerprint, check_tokenizer, open_tokenizer, opened, weights_kind
from hrm_megatron.generate.questions import Question
from hrm_megatron.generate.sampling import Sampling
from hrm_megatron.generate.transcript import Transcript
from hrm_megatron.generate.weights import Weights, take_weights
from hrm_megatron.parallel.precision import DTYPES, multiply_in_fp32


@dataclass(frozen=True)
class Answering:
    """The settings that, with the model and the question, determine the text of an answer."""

    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    h_cycles: int | None = None
    l_cycles: int | None = None
    exit_threshold: float | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "h_cycles", "l_cycles"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.exit_threshold is not None and not 0 < self.exit_threshold < math.inf:  # NaN too
            raise ConfigError(f"exit_threshold={self.exit_threshold}: must be a number above 0")
        if self.logprobs is not None and self.logprobs < 0:
            raise ConfigError(f"logprobs={self.logprobs}: must not be negative")
        if not all(self.stop):
            raise ConfigError("stop='': a stop string must not be empty")


class Session:
    """Answers questions with one checkpoint; `remark` says what of it could not be verified."""

    def __init__(self, load: Path, answering: Answering, tokenizer: Path | None = None, weights: str | None = None,
                 step: int | None = None, verify: bool = True) -> None:
        if (ranks := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise ConfigError(f"WORLD_SIZE={ranks}: generation runs in one process, also from checkpoints of tensor "
                              "parallel runs; start it without torchrun")
        multiply_in_fp32()
        self.tokenizer: TextTokenizer = open_tokenizer(tokenizer, load)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with opened(load, step, verify) as checkpoint:
            check_tokenizer(self.tokenizer, checkpoint)
            kind = weights_kind(checkpoint, weights)
            fingerprint = Fingerprint()
            found = take_weights(checkpoint.architecture, fingerprint.taking(checkpoint.weights(kind)),
                                 self.tokenizer.vocab_size, DTYPES[answering.dtype], device)
        self.remark = f"{checkpoint.path} {checkpoint.remark}" if checkpoint.remark else ""
        ends = checkpoint.token_ids.get("eos_token_id", [])
        self.stop_tokens = frozenset([self.tokenizer.eoa, *(ends if isinstance(ends, list) else [ends])])
        self._model: dict[str, Any] = dict(
            checkpoint=str(checkpoint.path.resolve()), weights=checkpoint.named(kind), iteration=checkpoint.step,
            fingerprint=str(fingerprint), tokenizer=self.tokenizer.fingerprint)
        self._answer_as(answering, found, checkpoint.training.seq_length)

    @classmethod
    def of_decoder(cls, decoder: Decoder, tokenizer: TextTokenizer, answering: Answering) -> Session:
        """Return a session for a decoder that does not come from a checkpoint; cycles and dtype are the decoder's."""
        made = cls.__new__(cls)
        made.decoder, made.tokenizer, made.answering, made.remark = decoder, tokenizer, answering, ""
        made.stop_tokens, made._model = frozenset([tokenizer.eoa]), {}
        made.identity = asdict(answering)
        return made

    def _answer_as(self, answering: Answering, weights: Weights, context_tokens: int) -> None:
        self.answering = answering
        self.decoder = Decoder(weights, context_tokens, answering.h_cycles, answering.l_cycles,
                               answering.exit_threshold)
        self.identity = dict(asdict(answering), **self._model)

    def at_depth(self, h_cycles: int | None, l_cycles: int | None, exit_threshold: float | None = None) -> Session:
        """Return a session with the same weights and other numbers of cycles."""
        other = copy.copy(self)
        other._answer_as(replace(self.answering, h_cycles=h_cycles, l_cycles=l_cycles, exit_threshold=exit_threshold),
                         self.decoder.weights, self.decoder.context_tokens)
        return other

    def text(self, tokens: Sequence[int]) -> str:
        """Decode the tokens of an answer, without its stop tokens."""
        return self.tokenizer.decode(token for token in tokens if token not in self.stop_tokens)

    def requests(self, questions: Sequence[Question]) -> list[Request]:
        """Tokenize questions into requests; each has its own random stream, by its index."""
        a = self.answering
        for question in questions:
            try:
                tags_of(question.condition, self.tokenizer.tag_ids)
            except ConfigError as error:
                raise ConfigError(f"{question.place}: {error}") from error
        prompts = self.tokenizer.encode_prefixes([question.condition for question in questions],
                                                 [question.instruction for question in questions])
        requests = []
        for stream, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
            if len(prompt) >= self.decoder.context_tokens:
                raise ConfigError(f"{question.place}: {len(prompt)} tokens, which leave no room for an answer in the "
                                  f"model's context of {self.decoder.context_tokens}; shorten it")
            requests.append(Request(prompt, a.max_new_tokens, a.sampling, self.stop_tokens, a.samples, a.stop,
                                    a.logprobs, stream))
        return requests

    def engine(self, requests: Sequence[Request], max_rows: int, say: Callable[[str], object]) -> Engine:
        """Return an engine whose cache holds the `max_rows` longest answers of `requests` at once.

        `say` gets a line with the size of the cache before it is allocated.
        """
        if max_rows < 1:
            raise ConfigError(f"--batch-size {max_rows}: must be at least 1")
        size = self._cache_size(requests, max_rows)
        say(size.check(self.decoder.device))
        return Engine(self.decoder, PagedCache(size, self.decoder.device), max_rows, self.text)

    def _cache_size(self, requests: Sequence[Request], max_rows: int) -> CacheSize:
        context = self.decoder.context_tokens
        needed = sorted((blocks_needed(len(request.prompt), min(request.max_new_tokens, context - len(request.prompt)))
                         for request in requests for _ in range(min(request.samples, max_rows))), reverse=True)
        return self.decoder.cache_size(sum(needed[:max_rows]))

    def rows_that_fit(self, requests: Sequence[Request], most: int) -> int:
        """Return the batch size whose cache fits into free memory: `most`, halved until it fits; 0: none."""
        free = free_bytes(self.decoder.device)
        while requests and most and not self._cache_size(requests, most).fits(free):
            most //= 2
        return most

    def answer(self, requests: Sequence[Request], max_rows: int, say: Callable[[str], object],
               on_progress: Callable[[Progress], object] = lambda progress: None) -> Iterator[list[Transcript]]:
        """Yield the samples of each request, in order, as soon as they and all before them have finished."""
        if not requests:
            return
        engine = self.engine(requests, max_rows, say)
        for request in requests:
            engine.submit(request)
        found: dict[int, list[Transcript]] = {}
        for number in range(len(requests)):
            while sum(sample.finish is not None for sample in found.get(number, [])) < requests[number].samples:
                for progress in engine.step():
                    progress.check()
                    samples = found.setdefault(progress.request, [])
                    if progress.sample == len(samples):  # samples begin in order
                        samples.append(progress.transcript)
                    on_progress(progress)
            yield found.pop(number)


def record(question: Question, samples: Sequence[Transcript], tokenizer: TextTokenizer) -> dict[str, Any]:
    """Return the JSON object of a question's answers, with lists if there are several samples."""
    def one(values: Sequence[Any]) -> Any:
        return values[0] if len(samples) == 1 else list(values)

    made = question.fields
    made["response" if len(samples) == 1 else "responses"] = one([sample.text for sample in samples])
    made["finish"] = one([sample.finish for sample in samples])
    if samples[0].h_cycles is not None:
        made["h_cycles"] = samples[0].h_cycles  # of the prompt, so of all samples
    if any(sample.logprobs for sample in samples):
        def spelled(token: int) -> str:
            return str(tokenizer.tokenizer.id_to_token(token))
        made["logprobs"] = one([[
            dict(token=spelled(each.token), id=each.token, logprob=each.logprob,
                 top=[dict(token=spelled(token), id=token, logprob=logprob) for token, logprob in each.top])
            for each in sample.logprobs] for sample in samples])
    return made
