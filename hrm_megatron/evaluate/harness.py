"""A model of lm-evaluation-harness: `python -m hrm_megatron.evaluate --model hrm_megatron ...`.

The harness has no entry points for models: importing this module registers one. A request's context is the prompt, seen
both ways; its continuation is the answer, which begins without the space that separated it from the context.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from hrm_megatron.config import ConfigError
from hrm_megatron.evaluate.likelihood import Pair, likelihoods, rolling
from hrm_megatron.generate.engine import Request
from hrm_megatron.generate.questions import Question
from hrm_megatron.generate.sampling import Sampling
from hrm_megatron.generate.session import Answering, Session

NEW_TOKENS = 256  # the harness's own default
TAG_SEPARATOR = "+"  # the harness ends an argument at a comma
KNOWN_SETTINGS = {"until", "max_gen_toks", "max_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed"}


@register_model("hrm_megatron")
class HrmMegatron(LM):  # type: ignore[misc]
    """Answer and score with one checkpoint of any format."""

    def __init__(self, load: str, condition: str = "direct", tokenizer: str | None = None, weights: str | None = None,
                 dtype: str = "float32", batch_size: str | int = 32, h_cycles: int | None = None,
                 l_cycles: int | None = None, strip: bool = True, device: str | None = None,
                 max_batch_size: int | None = None) -> None:
        super().__init__()
        if not str(batch_size).isdecimal():
            raise ConfigError(f"batch_size={batch_size}: give a number of answers at once")
        if device not in (None, "", "cuda", "cuda:0"):  # the last is what the harness gives where none is asked for
            raise ConfigError(f"device={device}: the first GPU is taken where there is one, else the CPU; leave it "
                              "out, and choose with CUDA_VISIBLE_DEVICES")
        self.session = Session(Path(load), Answering(dtype=dtype, h_cycles=h_cycles, l_cycles=l_cycles),
                               Path(tokenizer) if tokenizer else None, weights)
        self.condition, self.strip = str(condition).replace(TAG_SEPARATOR, ","), strip
        self.max_rows = min(int(batch_size), max_batch_size or int(batch_size))

    def _prompts(self, contexts: Sequence[str]) -> list[Sequence[int]]:
        """Spell contexts; the prompt of an empty one is its tags alone."""
        asked = [Question(f"request {number}", self.condition, context) for number, context in enumerate(contexts)
                 if context.strip()]
        found = iter([request.prompt for request in self.session.requests(asked)])
        empty = self.session.tokenizer.encode_prefix(self.condition, "")
        return [next(found) if context.strip() else empty for context in contexts]

    def _answer_tokens(self, text: str) -> list[int]:
        return self.session.tokenizer.encode_response(text)[:-1]  # without its end

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        contexts, continuations = zip(*(request.args for request in requests), strict=True) if requests else ((), ())
        prompts = self._prompts([context.strip() if self.strip else context for context in contexts])
        pairs = [Pair(prompt, self._answer_tokens(text.lstrip() if self.strip else text))
                 for prompt, text in zip(prompts, continuations, strict=True)]
        with tqdm(total=len(pairs), desc="log-likelihoods") as bar:
            return [(each.logprob, each.greedy)
                    for each in likelihoods(self.session.decoder, pairs, on_scored=bar.update)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        found = []
        [prompt] = self._prompts([""])
        for request in tqdm(requests, desc="rolling log-likelihood"):
            parts = rolling(prompt, self._answer_tokens(request.args[0]), self.session.decoder.context_tokens)
            found.append(sum(each.logprob for each in likelihoods(self.session.decoder, parts)))
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        prompts = self._prompts([request.args[0].strip() if self.strip else request.args[0] for request in requests])
        wanted = [self._request(stream, prompt, request.args[1])
                  for stream, (prompt, request) in enumerate(zip(prompts, requests, strict=True))]
        answers = self.session.answer(wanted, self.max_rows, print)
        return [samples[0].text for samples in tqdm(answers, total=len(wanted), desc="answers")]

    def _request(self, stream: int, prompt: Sequence[int], settings: Mapping[str, Any]) -> Request:
        if unknown := sorted(settings.keys() - KNOWN_SETTINGS):
            raise ConfigError(f"generation setting {unknown[0]!r}: unknown; use {', '.join(sorted(KNOWN_SETTINGS))}")
        until = settings.get("until") or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
        sampled = settings.get("do_sample", True) and temperature > 0  # a task may ask for samples of temperature 0
        sampling = Sampling(temperature, settings.get("top_p", 1.0), settings.get("seed", 1234),
                            settings.get("top_k", 0), settings.get("min_p", 0.0)) if sampled else Sampling()
        new_tokens = settings.get("max_gen_toks", settings.get("max_tokens", NEW_TOKENS))
        return Request(prompt, new_tokens, sampling, self.session.stop_tokens, 1, stop, None, stream)

    @property
    def tokenizer_name(self) -> str:
        return str(self.session.tokenizer.path)
