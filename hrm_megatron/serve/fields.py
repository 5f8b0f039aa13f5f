"""Request bodies: their parameters, types and bounds; unknown parameters are refused by name."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator

DEFAULT_COMPLETION_TOKENS = 16  # default of OpenAI's API
MAX_CHOICES, MAX_STOPS, MAX_LOGPROBS = 128, 16, 20
SEEDS = 1 << 63
MAX_MESSAGES = 1 << 14  # more than fit into any context: a turn has several tokens
MANY_NAMES = 99  # more than any body has
# Parameters of OpenAI's API that are not supported, and the values that request nothing and are accepted, besides null.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "repetition_penalty": (1,), "user": ("",), "tools": ([],), "tool_choice": ("none",), "functions": ([],),
    "function_call": ("none",), "parallel_tool_calls": (False,), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",), "audio": (), "prediction": (), "web_search_options": (),
}
OF_STREAMS_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}

# Only the first error is reported, so lists fail fast: while pydantic collects further ones, no request is served.
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


def _one_of(kinds: str) -> WrapValidator:
    """Return a validator whose error says what a union may be; pydantic's own has one error per type."""
    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(f"must be {kinds}") from error
    return WrapValidator(validate)


class Refused(ValueError):
    """An error of a parameter that pydantic does not name itself, since it is checked together with others or before
    them."""

    def __init__(self, parameter: str, reason: str) -> None:
        super().__init__(reason)
        self.parameter = parameter


def asked_for(body: dict[str, Any], without_effect: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return the body without nulls and without parameters at a value in `without_effect`; refuse these parameters with
    other values."""
    kept = {}
    for name, value in body.items():
        if name in without_effect and value is not None:
            # compare types too: in Python True == 1
            if not any(value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
                       for nothing in without_effect[name]):
                raise Refused(name, "is without effect here; leave it out")
        elif value is not None:
            kept[name] = value
    return kept


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def keep_one_unknown(cls, body: Any) -> Any:
        """Of a body with many names keep only the first unknown one, which is then refused."""
        if not isinstance(body, dict) or len(body) <= MANY_NAMES:
            return body
        known = cls.model_fields
        first = next(name for name in body if name not in known)
        return {name: value for name, value in body.items() if name in known or name == first}


class StreamOptions(Strict):
    include_usage: bool = False

    @model_validator(mode="before")
    @classmethod
    def drop_what_asks_for_nothing(cls, options: Any) -> Any:
        return asked_for(options, OF_STREAMS_WITHOUT_EFFECT) if isinstance(options, dict) else options


class Common(Strict):
    """Parameters of both kinds of request. `condition` is an addition to OpenAI's API: comma-separated tags."""

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
        return asked_for(body, WITHOUT_EFFECT | {"best_of": (1, body.get("n"))})  # best_of = n selects nothing

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
        """The prompts as a list, also if there is one."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        found: Any = [self.prompt] if one else self.prompt
        return found

    @model_validator(mode="after")
    def writes_something(self) -> CompletionBody:
        if not self.max_tokens and not self.echo:
            raise Refused("max_tokens", "0 answers nothing; give at least 1, or echo too")
        return self


class TextPart(BaseModel):
    model_config = Strict.model_config  # not its validator, since there may be many parts

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a chat. Turns that a server generated come back with extra empty fields, which are dropped."""

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
