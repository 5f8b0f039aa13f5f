"""Convert request bodies to requests of the engine: which tokens are the prefix, and which begin the answer.

A string is a question: its text is put between the control tokens of questions, with the tags of `condition`, as in
training and tools/generate.py. Token ids are used as given: the prefix ends with the first end-of-question token, and
the tokens after it begin the answer, which is causal. Ids without that token are all prefix.
"""
from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.chat import SPEAKERS, Turn, prefix_of
from hrm_megatron.data.spelling import tags_of
from hrm_megatron.generate.engine import Request
from hrm_megatron.generate.questions import Question
from hrm_megatron.generate.sampling import Sampling
from hrm_megatron.generate.session import Session
from hrm_megatron.serve.errors import ApiError
from hrm_megatron.serve.fields import ChatBody, Common, CompletionBody, Message

Longest = Callable[[int], int]  # prompt tokens > most answer tokens that there is room for
LONG_TOKEN = 16  # characters per token; in words it is about four


def completion_requests(body: CompletionBody, session: Session, longest: Longest) -> list[Request]:
    prompts: Any = body.prompts
    parts: list[tuple[list[int], list[int]]]
    if isinstance(prompts[0], str):
        parts = [(prefix, []) for prefix in _questions(prompts, body.condition, session, "prompt")]
    else:
        if "condition" in body.model_fields_set:
            raise ApiError(400, "condition: is without effect on token ids, which hold their tags; leave it out",
                           "condition")
        parts = [_split(ids, session) for ids in prompts]
    if body.echo and body.logprobs is not None and not all(given for _, given in parts):
        eoq = session.tokenizer.spelling.eoq
        raise ApiError(400, "echo: with logprobs it scores an answer, and this prompt is a question alone, which is "
                            f"read both ways and has no logprobs; send token ids with {eoq} between question and "
                            "answer", "echo")
    if not body.max_tokens and not all(given for _, given in parts):
        raise ApiError(400, "max_tokens: 0 scores the answer that a prompt has begun, and this one is a question "
                            "alone; give at least 1", "max_tokens")
    return [_request(body, session, longest, prefix, body.max_tokens, body.logprobs, stream, given)
            for stream, (prefix, given) in enumerate(parts)]


def chat_request(body: ChatBody, session: Session, longest: Longest) -> Request:
    [prefix] = _questions([_conversation(body.messages)], body.condition, session, "messages")
    asked = body.max_completion_tokens or body.max_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    return _request(body, session, longest, prefix, asked or max(longest(len(prefix)), 1), top, 0, [])


def _conversation(messages: Sequence[Message]) -> str:
    """Return a chat as the text that training uses (data/chat.py); a single question is its own text."""
    for number, message in enumerate(messages):
        if not message.text.strip() and message.role == "user":  # an assistant's turn may be empty
            raise ApiError(400, f"messages.{number}.content: empty; write something", "messages")
    if messages[-1].role != "user":
        raise ApiError(400, f"messages: the last is of the role {messages[-1].role}; end with a question of the user",
                       "messages")
    return prefix_of([Turn(SPEAKERS[message.role], message.text) for message in messages if message.text.strip()])


def _questions(texts: Sequence[str], condition: str, session: Session, parameter: str) -> list[list[int]]:
    boq = session.tokenizer.spelling.boq
    for number, text in enumerate(texts):
        if text.startswith(boq):
            raise ApiError(400, f"{parameter}: begins with {boq}, but control tokens in a text are text; send the "
                                "question alone, or token ids", parameter)
        try:
            Question(f"{parameter} {number}" if len(texts) > 1 else parameter, condition, text)
        except ConfigError as error:
            raise ApiError(400, str(error), parameter) from error
    try:
        tags_of(condition, session.tokenizer.tag_ids)
    except ConfigError as error:
        raise ApiError(400, str(error), "condition") from error
    for text in texts:
        _check_beginning(text, session, parameter)
    return session.tokenizer.encode_prefixes([condition] * len(texts), texts)


def _check_beginning(text: str, session: Session, parameter: str) -> None:
    """Refuse a text that is surely too long by tokenizing only its beginning, since tokenizing all of it would take
    seconds."""
    context = session.decoder.context_tokens
    beginning = text[:LONG_TOKEN * context]
    # Factor 2: near the cut the tokens may differ from those of the whole text.
    if len(text) > len(beginning) and len(session.tokenizer.encode_response(beginning)) > 2 * context:
        raise ApiError(400, f"{parameter}: {len(text)} characters, of which the first {len(beginning)} alone exceed "
                            f"the model's context of {context} tokens; shorten the prompt", parameter,
                       "context_length_exceeded")


def _split(ids: Sequence[int], session: Session) -> tuple[list[int], list[int]]:
    """Split token ids into the prefix and the answer's beginning."""
    if (largest := max(ids)) >= session.decoder.vocab_size:
        raise ApiError(400, f"prompt: token {largest} is not below the vocabulary's size of "
                            f"{session.decoder.vocab_size}", "prompt")
    eoq, spelling = session.tokenizer.eoq, session.tokenizer.spelling
    if eoq in ids and ids[0] != session.tokenizer.boq:
        raise ApiError(400, f"prompt: token ids with {spelling.eoq} that do not begin with {spelling.boq} are a "
                            "question that has lost its beginning; send all of it, within the model's context of "
                            f"{session.decoder.context_tokens} tokens (lm-eval cuts off what exceeds its max_length)",
                       "prompt")
    end = ids.index(eoq) + 1 if eoq in ids else len(ids)
    return list(ids[:end]), list(ids[end:])


def _request(body: Common, session: Session, longest: Longest, prefix: list[int], max_tokens: int,
             logprobs: int | None, stream: int, given: list[int]) -> Request:
    known, context = len(prefix) + len(given), session.decoder.context_tokens
    if known + max_tokens > context:
        raise ApiError(400, f"max_tokens: the prompt's {known} tokens and {max_tokens} more exceed the model's context "
                            f"of {context}; shorten the prompt or ask for fewer", "max_tokens",
                       "context_length_exceeded")
    if (room := longest(len(prefix)) - len(given)) < max_tokens:
        raise ApiError(400, f"max_tokens: the prompt's {known} tokens and {max_tokens} more exceed the server's key-"
                            f"value cache (--cache-tokens), which leaves room for {max(room, 0)}; shorten the prompt "
                            "or ask for fewer", "max_tokens")
    seed = secrets.randbits(62) if body.seed is None else body.seed
    try:
        sampling = Sampling(body.temperature, body.top_p, seed, body.top_k, body.min_p)
    except ConfigError as error:
        raise ApiError(400, str(error), str(error).split("=")[0].split(",")[0]) from error
    return Request(prefix, max_tokens, sampling, session.stop_tokens, body.n, body.stops, logprobs, stream, given)
