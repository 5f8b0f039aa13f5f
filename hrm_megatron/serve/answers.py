"""Answers as response bodies of OpenAI's API, complete or streamed."""
from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hrm_megatron.generate.engine import Request
from hrm_megatron.generate.transcript import TokenLogprob
from hrm_megatron.serve.live_engine import Event
from hrm_megatron.serve.spelled_tokens import TextOffsets, TokenSpelling

Prompt = str | Sequence[int]  # as a client sends it


@dataclass
class _Choice:
    """One answer: the part not sent yet, and the text offset of its next token."""

    request: Request
    echo: Prompt
    offsets: TextOffsets
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    begun: bool = False


class Answers:
    """Collects the events of one request and formats them as a chat or as completions, with the prompts of `echo` in
    front.

    A text is echoed as sent, not decoded from tokens, since clients strip it by length and tokenizers may normalize it
    (NFC).
    """

    def __init__(self, requests: Sequence[Request], spelling: TokenSpelling, model: str, fingerprint: str,
                 chat: bool, echo: Sequence[Prompt] = ()) -> None:
        self.spelling, self.chat, self.echo = spelling, chat, bool(echo)
        self.choices = [_Choice(request, prompt, TextOffsets(self.echo * (len(request.prompt) + len(request.given))))
                        for request, prompt in zip(requests, echo or [""] * len(requests), strict=True)
                        for _ in range(request.samples)]
        self.first = [sum(request.samples for request in requests[:place]) for place in range(len(requests))]
        self.completion_tokens = 0
        self.prompt_tokens = sum(len(request.prompt) + len(request.given) for request in requests)
        self.head = dict(id=("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex, created=int(time.time()),
                         model=model, system_fingerprint=fingerprint)

    def take(self, event: Event) -> int:
        """Record an event and return the index of its choice."""
        index = self.first[event.prompt] + event.sample
        choice = self.choices[index]
        self.completion_tokens += not event.given
        choice.text += event.piece
        choice.finish = event.finish
        if event.logprob and (self.echo or not event.given):
            choice.logprobs.append(event.logprob)
        return index

    def whole(self) -> dict[str, Any]:
        """Return the body, once every choice has finished."""
        return dict(self.head, object="chat.completion" if self.chat else "text_completion",
                    choices=[self._spell(index, "message") for index in range(len(self.choices))], usage=self.usage())

    def usage(self) -> dict[str, int]:
        return dict(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens,
                    total_tokens=self.prompt_tokens + self.completion_tokens)

    def beginning(self) -> Iterator[dict[str, Any]]:
        """Yield the first chunks of a stream: in a chat, the role."""
        if self.chat:
            for index in range(len(self.choices)):
                delta = dict(role="assistant", content="")
                yield self._chunk([dict(index=index, delta=delta, logprobs=None, finish_reason=None)])

    def piece(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the chunk of an event, if it has new content."""
        index = self.take(event)
        choice = self.choices[index]
        if choice.finish or (not event.given and (choice.text or choice.logprobs)):
            yield self._chunk([self._spell(index, "delta")])

    def end(self) -> dict[str, Any]:
        """Return the last chunk, for clients that ask for usage."""
        return dict(self._chunk([]), usage=self.usage())

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.head, object="chat.completion.chunk" if self.chat else "text_completion", choices=choices)

    def _text_of(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self.spelling.tokenizer.decode(prompt)

    def _spell(self, index: int, name: str) -> dict[str, Any]:
        """Return the part of a choice that was not sent yet, and mark it as sent."""
        choice, request = self.choices[index], self.choices[index].request
        echoed = self.echo and not choice.begun
        prefix = request.prompt if echoed else ()
        text = (self._text_of(choice.echo) if echoed else "") + choice.text
        spelled: dict[str, Any] | None = None
        if request.logprobs is not None:
            spelled = self.spelling.chat_logprobs(choice.logprobs) if self.chat else \
                self.spelling.completion_logprobs(prefix, choice.logprobs, choice.offsets)
        choice.text, choice.logprobs, choice.begun = "", [], True
        said = dict(index=index, logprobs=spelled, finish_reason=choice.finish)
        if not self.chat:
            return dict(said, text=text)
        who = dict(role="assistant", refusal=None) if name == "message" else {}
        return dict(said, **{name: dict(who, content=text)})
