"""A model for lm-evaluation-harness: `python -m hrm_megatron.evaluate --model hrm_megatron ...`.

The harness has no entry points for models: importing this module registers it. A request's context is the prompt, which
is bidirectional; its continuation is the answer, without the space that separates it from the context.
"""
from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import register_model
from tqdm import tqdm

from hrm_megatron.config import ConfigError
from hrm_megatron.data.chat import SPEAKERS, Turn, prefix_of
from hrm_megatron.data.spelling import tags_of
from hrm_megatron.data.text_files import shown
from hrm_megatron.evaluate.likelihood import Pair, likelihoods, rolling
from hrm_megatron.generate.answer_file import check_same
from hrm_megatron.generate.engine import Request
from hrm_megatron.generate.questions import check_text
from hrm_megatron.generate.sampling import Sampling
from hrm_megatron.generate.session import Answering, Session
from hrm_megatron.parallel.precision import DTYPES

log = logging.getLogger(__name__)

NEW_TOKENS = 256  # the harness's default
TAG_SEPARATOR = "+"  # the harness splits arguments at commas
MADE_BY = "hrm_megatron"  # key in a cache that records which model answered
KNOWN_SETTINGS = {"until", "max_gen_toks", "max_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed"}
ARGUMENTS = ("load", "condition", "tokenizer", "weights", "dtype", "h_cycles", "l_cycles", "strip")


@register_model("hrm_megatron")
class HrmMegatron(LM):  # type: ignore[misc]
    """Generates and scores with one checkpoint of any format."""

    def __init__(self, load: str | None = None, condition: str = "direct", tokenizer: str | None = None,
                 weights: str | None = None, dtype: str = "float32", batch_size: str | int = 32,
                 h_cycles: int | None = None, l_cycles: int | None = None, strip: bool = True,
                 device: str | None = None, max_batch_size: int | None = None, **unknown: object) -> None:
        super().__init__()
        if unknown or load is None:
            wrong = " ".join(f"{name}={value}: unknown" for name, value in unknown.items()) or "load is missing"
            raise ConfigError(f"--model_args: {wrong}; give {', '.join(ARGUMENTS)}")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype}: choose from {', '.join(DTYPES)}")
        if not isinstance(strip, bool):
            raise ConfigError(f"strip={strip}: give True or False")
        for name, cycles in (("h_cycles", h_cycles), ("l_cycles", l_cycles)):
            if cycles is not None and type(cycles) is not int:
                raise ConfigError(f"{name}={cycles}: give a number of cycles")
        if not str(batch_size).isdecimal():
            raise ConfigError(f"batch_size={batch_size}: give a number of answers at once")
        if device not in (None, "", "cuda", "cuda:0"):  # cuda:0 is the harness's default
            raise ConfigError(f"device={device}: the first GPU is taken where there is one, else the CPU; leave it "
                              "out, and choose with CUDA_VISIBLE_DEVICES")
        self.session = Session(Path(str(load)), Answering(dtype=dtype, h_cycles=h_cycles, l_cycles=l_cycles),
                               Path(str(tokenizer)) if tokenizer else None, weights)
        self.condition, self.strip = str(condition).replace(TAG_SEPARATOR, ","), strip
        tags_of(self.condition, self.session.tokenizer.tag_ids)  # refuses unknown tags
        self.empty = self.session.tokenizer.encode_prefix(self.condition, "")
        self.max_rows = min(int(batch_size), max_batch_size or int(batch_size))

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Install the cache of `--use_cache`; its keys are requests only, so refuse one of another model or other
        settings."""
        cache = cache_hook.dbdict
        begun = Path(cache.filename)
        settings = json.loads(json.dumps(dict(self.session.identity, condition=self.condition, strip=self.strip)))
        if MADE_BY not in cache and len(cache):
            raise ConfigError(f"--use_cache {begun}: does not say which model answered; give another name")
        check_same(cache.setdefault(MADE_BY, settings), settings, begun, ", or give another name as --use_cache")
        super().set_cache_hook(cache_hook)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]],
                            add_generation_prompt: bool = True) -> str:
        """Return a chat as the text that training uses (data/chat.py); a single question is its own text."""
        if not add_generation_prompt:
            raise ConfigError("--apply_chat_template: a task begins the answer itself (gen_prefix), which a chat "
                              "cannot; leave the flag or the task out")
        for message in chat_history:
            if message["role"] not in SPEAKERS or not isinstance(message["content"], str):
                raise ConfigError(f"--apply_chat_template: a turn of {shown(message)} is no text of "
                                  f"{' or '.join(SPEAKERS)}; leave the flag or the task out")
        return prefix_of([Turn(SPEAKERS[message["role"]], message["content"]) for message in chat_history
                          if message["content"].strip()])

    def _prompts(self, requests: Sequence[Any], rooms: Sequence[int]) -> list[Sequence[int]]:
        """Tokenize contexts; a prompt of more tokens than its room loses the beginning of its context, as in the
        harness's own models."""
        context_tokens = self.session.decoder.context_tokens
        contexts = [request.args[0].strip() if self.strip else request.args[0] for request in requests]
        contexts = [context if context.strip() else "" for context in contexts]  # its prompt is the tags only
        for request, context in zip(requests, contexts, strict=True):
            check_text(_place(request), context)
        prompts: list[Sequence[int]] = []
        spelled = self.session.tokenizer.encode_prefixes([self.condition] * len(contexts), contexts)
        for request, prompt, room in zip(requests, spelled, rooms, strict=True):
            if room < len(self.empty):
                raise ConfigError(f"{_place(request)}: its answer leaves no room for a prompt in the model's context "
                                  f"of {context_tokens} tokens; leave the task out")
            begin, over = len(self.empty) - 1, max(0, len(prompt) - room)  # the last token of `empty` ends a prompt
            prompts.append([*prompt[:begin], *prompt[begin + over:]])
        if cut := sum(len(prompt) > room for prompt, room in zip(spelled, rooms, strict=True)):
            log.warning("%d of %d contexts do not fit the model's %d tokens beside their answers: their beginnings are "
                        "cut off", cut, len(spelled), context_tokens)
        return prompts

    def _answer_tokens(self, request: Any, text: str) -> list[int]:
        check_text(f"{_place(request)}: answer", text)
        return self.session.tokenizer.encode_response(text)[:-1]  # without the end token

    def _continuation(self, request: Any) -> list[int]:
        text = request.args[1].lstrip() if self.strip else request.args[1]
        if not text:
            raise ConfigError(f"{_place(request)}: answer {request.args[1]!r} has no token to score; "
                              f"{'pass strip=False, or ' if request.args[1] else ''}leave the task out")
        return self._answer_tokens(request, text)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        answers = list(map(self._continuation, requests))
        # + 1: the last token of an answer is predicted, not read.
        rooms = [self.session.decoder.context_tokens + 1 - len(answer) for answer in answers]
        pairs = list(map(Pair, self._prompts(requests, rooms), answers))
        with tqdm(total=len(pairs), desc="log-likelihoods") as bar:
            return [(each.logprob, each.greedy)
                    for each in likelihoods(self.session.decoder, pairs, on_scored=bar.update)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        found = []
        for request in tqdm(requests, desc="rolling log-likelihood"):
            text = self._answer_tokens(request, request.args[0])
            parts = rolling(self.empty, text, self.session.decoder.context_tokens)
            found.append(sum(each.logprob for each in likelihoods(self.session.decoder, parts)))
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        context_tokens, again = self.session.decoder.context_tokens, Counter[tuple[str, int]]()
        rooms = [context_tokens - min(_new_tokens(request.args[1]), context_tokens // 2) for request in requests]
        wanted = []
        for prompt, request in zip(self._prompts(requests, rooms), requests, strict=True):
            # By document, not by position in this list: the harness omits cached requests.
            stream = request.doc_id * request.repeats + again[request.task_name, request.doc_id]
            again[request.task_name, request.doc_id] += 1
            wanted.append(self._request(stream, prompt, request.args[1]))
        answers = self.session.answer(wanted, self.max_rows, print)
        return [samples[0].text for samples in tqdm(answers, total=len(wanted), desc="answers")]

    def _request(self, stream: int, prompt: Sequence[int], settings: Mapping[str, Any]) -> Request:
        if unknown := sorted(settings.keys() - KNOWN_SETTINGS):
            raise ConfigError(f"generation setting {unknown[0]!r}: unknown; use {', '.join(sorted(KNOWN_SETTINGS))}")
        until = settings.get("until") or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
        sampled = settings.get("do_sample", True) and temperature > 0  # tasks may combine do_sample with temperature 0
        sampling = Sampling(temperature, settings.get("top_p", 1.0), settings.get("seed", 1234),
                            settings.get("top_k", 0), settings.get("min_p", 0.0)) if sampled else Sampling()
        return Request(prompt, _new_tokens(settings), sampling, self.session.stop_tokens, 1, stop, None, stream)

    @property
    def tokenizer_name(self) -> str:
        return str(self.session.tokenizer.path)


def _place(request: Any) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _new_tokens(settings: Mapping[str, Any]) -> int:
    return int(settings.get("max_gen_toks", settings.get("max_tokens", NEW_TOKENS)))
