"""Answers as the bodies of OpenAI's API, whole or in pieces."""
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


@dataclass
class _Choice:
    """One answer: what is not out yet, and where its next token begins."""

    request: Request
    offsets: TextOffsets
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    begun: bool = False


class Answers:
    """Collects the events of one request and spells them: as a chat, or as completions with or without an echo."""

    def __init__(self, requests: Sequence[Request], spelling: TokenSpelling, model: str, fingerprint: str,
                 chat: bool, echo: bool = False) -> None:
        self.spelling, self.chat, self.echo = spelling, chat, echo
        self.choices = [_Choice(request, TextOffsets((len(request.prompt) + len(request.given)) * echo))
                        for request in requests for _ in range(request.samples)]
        self.first = [sum(request.samples for request in requests[:place]) for place in range(len(requests))]
        self.completion_tokens = 0
        self.prompt_tokens = sum(len(request.prompt) + len(request.given) for request in requests)
        self.head = dict(id=("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex, created=int(time.time()),
                         model=model, system_fingerprint=fingerprint)

    def take(self, event: Event) -> int:
        """Note an event and return the choice that it belongs to."""
        index = self.first[event.prompt] + event.sample
        choice = self.choices[index]
        self.completion_tokens += not event.given
        choice.text += event.piece
        choice.finish = event.finish
        if event.logprob and (self.echo or not event.given):
            choice.logprobs.append(event.logprob)
        return index

    def whole(self) -> dict[str, Any]:
        """The body, once every choice has finished."""
        return dict(self.head, object="chat.completion" if self.chat else "text_completion",
                    choices=[self._spell(index, "message") for index in range(len(self.choices))], usage=self.usage())

    def usage(self) -> dict[str, int]:
        return dict(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens,
                    total_tokens=self.prompt_tokens + self.completion_tokens)

    def beginning(self) -> Iterator[dict[str, Any]]:
        """The first chunks of a stream: who speaks, in a chat."""
        if self.chat:
            for index in range(len(self.choices)):
                delta = dict(role="assistant", content="")
                yield self._chunk([dict(index=index, delta=delta, logprobs=None, finish_reason=None)])

    def piece(self, event: Event) -> Iterator[dict[str, Any]]:
        """The chunk that an event makes, if there is something to tell."""
        index = self.take(event)
        choice = self.choices[index]
        if choice.finish or (not event.given and (choice.text or choice.logprobs)):
            yield self._chunk([self._spell(index, "delta")])

    def end(self) -> dict[str, Any]:
        """The last chunk, of clients that ask for usage."""
        return dict(self._chunk([]), usage=self.usage())

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.head, object="chat.completion.chunk" if self.chat else "text_completion", choices=choices)

    def _spell(self, index: int, name: str) -> dict[str, Any]:
        """Spell what is not out yet of a choice, and note that it is."""
        choice, request = self.choices[index], self.choices[index].request
        echoed = self.echo and not choice.begun
        prefix = request.prompt if echoed else ()
        text = (self.spelling.tokenizer.decode([*prefix, *request.given]) if echoed else "") + choice.text
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
