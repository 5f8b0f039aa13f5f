"""Bodies of requests: which parameters there are, their types and bounds; others are refused by name."""
from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator

DEFAULT_COMPLETION_TOKENS = 16  # of OpenAI's API
MAX_CHOICES, MAX_STOPS, MAX_LOGPROBS = 128, 16, 20
SEEDS = 1 << 63
MAX_MESSAGES = 1 << 14  # beyond every context: a turn has several tokens
MANY_NAMES = 99  # more than any body has
# Parameters of OpenAI's API that nothing here reads, and the values with which they ask for nothing. null always does.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "repetition_penalty": (1,), "user": ("",), "tools": ([],), "tool_choice": ("none",), "functions": ([],),
    "function_call": ("none",), "parallel_tool_calls": (False,), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",), "audio": (), "prediction": (), "web_search_options": (),
}

# Only the first thing that is wrong is told, so lists end with it: nobody is served while pydantic collects the others.
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


def _one_of(kinds: str) -> WrapValidator:
    """Say what a value of several types may be: pydantic tells, for each type, why it is not that."""
    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(f"must be {kinds}") from error
    return WrapValidator(validate)


class Refused(ValueError):
    """A parameter that pydantic does not name itself, since it is judged with others or before all."""

    def __init__(self, parameter: str, reason: str) -> None:
        super().__init__(f"{parameter}: {reason}")
        self.parameter = parameter


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def keep_one_unknown(cls, body: Any) -> Any:
        """Of many names drop those that are unknown, but the first, which is refused."""
        if not isinstance(body, dict) or len(body) <= MANY_NAMES:
            return body
        known = cls.model_fields
        first = next(name for name in body if name not in known)
        return {name: value for name, value in body.items() if name in known or name == first}


class StreamOptions(Strict):
    include_usage: bool = False


class Common(Strict):
    """What both kinds of request have. `condition` is an addition to OpenAI's: tags, comma-separated."""

    model: str | None = None
    condition: str = "direct"
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[Text | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] | None, _one_of(
        f"a text or a list of at most {MAX_STOPS} texts, none of them empty")] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = 1.0  # OpenAI's default
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None  # None: a new one for each request

    @model_validator(mode="before")
    @classmethod
    def drop_what_asks_for_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object, sent as application/json")
        kept = {}
        for name, value in body.items():
            if name in WITHOUT_EFFECT and value is not None:
                # type: True is 1 and "" is no list in JSON
                idle = (*WITHOUT_EFFECT[name], *([body.get("n")] if name == "best_of" else []))  # the best n of n
                if not any(value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
                           for nothing in idle):
                    raise Refused(name, "is without effect here; leave it out")
            elif value is not None:
                kept[name] = value
        return kept

    @model_validator(mode="after")
    def has_a_use(self) -> Common:
        if self.stream_options and not self.stream:
            raise Refused("stream_options", "is without effect unless stream is true; leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(Common):
    prompt: Annotated[
        str | TokenIds | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)],
        _one_of("a text, token ids (integers from 0 on), or a list of texts or of token ids; no list may be empty")]
    max_tokens: Annotated[int, Field(ge=0)] = DEFAULT_COMPLETION_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, also a single one."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        found: Any = [self.prompt] if one else self.prompt
        return found

    @model_validator(mode="after")
    def writes_something(self) -> CompletionBody:
        if not self.max_tokens and not self.echo:
            raise Refused("max_tokens", "0 answers nothing; give at least 1, or echo too")
        return self


class TextPart(BaseModel):
    model_config = Strict.model_config  # without its validator, since there may be many parts

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn. One that this server or another has answered comes back with fields that say nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | Annotated[list[TextPart], Field(fail_fast=True)], _one_of(
        'a text or a list of {"type": "text", "text": ...}; there is nothing else that the model reads')]

    @model_validator(mode="before")
    @classmethod
    def drop_what_says_nothing(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        known = cls.model_fields
        return {name: value for name, value in message.items() if name in known or value not in (None, [])}

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(Common):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def says_it_once(self) -> ChatBody:
        if self.max_tokens and self.max_completion_tokens:
            raise Refused("max_tokens", "is the old name of max_completion_tokens; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("top_logprobs", "is without effect unless logprobs is true; leave it out")
        return self
