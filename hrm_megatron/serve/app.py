"""The routes of the server: OpenAI's completions and chat, models, health, metrics, and a page to try prompts on."""
from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from hrm_megatron.config import ConfigError
from hrm_megatron.generate import engine
from hrm_megatron.generate.session import Session
from hrm_megatron.serve.answers import Answers
from hrm_megatron.serve.errors import ApiError, of_validation
from hrm_megatron.serve.fields import ChatBody, CompletionBody
from hrm_megatron.serve.guard import GONE, Guard, Limits
from hrm_megatron.serve.live_engine import LiveEngine, Ticket
from hrm_megatron.serve.metrics import metrics_text
from hrm_megatron.serve.prompts import chat_request, completion_requests
from hrm_megatron.serve.spelled_tokens import TokenSpelling

MOST_LOGPROBS = 1 << 19  # per body, which is held in memory: about 40 MB of JSON
PAGE = Path(__file__).with_name("page.html")


@dataclass
class Service:
    """The model, engine and limits that requests are answered with."""

    session: Session
    live: LiveEngine
    model: str
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.spelling = TokenSpelling(self.session.tokenizer)
        identity = json.dumps(self.session.identity, sort_keys=True, default=str)
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]
        self.created = int(time.time())
        self._spelling_in_turns = asyncio.Lock()

    def check_model(self, model: str | None) -> None:
        if model not in (None, self.model):
            raise ApiError(404, f"model: there is no {model[:100]!r} here; this is {self.model!r}", "model",
                           "model_not_found")

    async def answer(self, http: Request, body: CompletionBody | ChatBody) -> Response:
        """Answer a body as one JSON object or as a stream; its places are released however that ends."""
        self.check_model(body.model)
        chat = isinstance(body, ChatBody)
        ticket = self.live.open(1 if isinstance(body, ChatBody) else len(body.prompts), self.limits.timeout_seconds)
        try:
            # Tokenizing a long text takes time, so it runs in a thread and the event loop serves others. The lock is
            # awaited without holding a thread: the thread pool also formats other answers.
            async with self._spelling_in_turns:
                requests = await asyncio.to_thread(self._requests, body)
            self.live.submit(ticket, requests)
        except BaseException as error:
            self.live.release(ticket)
            if isinstance(error, ConfigError):
                raise ApiError(400, str(error)) from error
            raise
        answers = Answers(requests, self.spelling, self.model, self.fingerprint, chat,
                          body.prompts if isinstance(body, CompletionBody) and body.echo else ())
        if body.stream:
            return _Stream(self, ticket, self._chunks(http, ticket, answers, body.with_usage))
        try:
            await self._while_there(http, self._collect(ticket, answers))
        finally:
            self.live.release(ticket)
        return await asyncio.to_thread(lambda: JSONResponse(answers.whole()))  # slow for large bodies

    def _requests(self, body: CompletionBody | ChatBody) -> list[engine.Request]:
        longest = self.live.engine.longest_answer
        requests = [chat_request(body, self.session, longest)] if isinstance(body, ChatBody) else \
            completion_requests(body, self.session, longest)
        numbers = sum(request.samples * (request.max_new_tokens + len(request.given)) * (1 + request.logprobs)
                      for request in requests if request.logprobs is not None)
        if numbers > MOST_LOGPROBS and not body.stream:
            raise ApiError(400, f"logprobs: up to {numbers} of them in one body; ask for at most {MOST_LOGPROBS} by "
                                "fewer tokens, choices or likely ones, or for a stream", "logprobs")
        return requests

    async def _collect(self, ticket: Ticket, answers: Answers) -> None:
        async for event in ticket:
            answers.take(event)

    async def _while_there(self, http: Request, work: Any) -> None:
        """Await `work`, or cancel it when the client disconnects."""
        async def gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ApiError(GONE, "the client went away")
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError, ApiError):
                    await task

    async def _chunks(self, http: Request, ticket: Ticket, answers: Answers, with_usage: bool) -> AsyncIterator[str]:
        for chunk in answers.beginning():
            yield _event(chunk)
        try:
            async for event in ticket:
                for chunk in answers.piece(event):
                    yield _event(chunk)
        except ApiError as error:
            http.state.failed = error.status  # for the metrics: the client already has status 200
            yield _event(error.body())
        else:
            if with_usage:
                yield _event(answers.end())
        yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """Server-sent events; releases the ticket when the stream ends, from either side."""

    def __init__(self, service: Service, ticket: Ticket, chunks: AsyncIterator[str]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.service, self.ticket = service, ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.live.release(self.ticket)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def page() -> tuple[str, str]:
    """Return the page, and the Content-Security-Policy that allows its own script and forbids loading anything."""
    text = PAGE.read_text(encoding="utf-8")
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return text, (f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
                  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def build_app(service: Service, api_key: str | None = None) -> Guard:
    """Return the ASGI application; its `drain` shuts the server down gracefully."""
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.live.close)

    app = FastAPI(title="hrm_megatron", lifespan=lifespan, docs_url=None, redoc_url=None)
    guard = Guard(app, service.limits, api_key)
    html, policy = page()

    @app.post("/v1/completions")
    async def completions(http: Request, body: CompletionBody) -> Response:
        return await service.answer(http, body)

    @app.post("/v1/chat/completions")
    async def chat(http: Request, body: ChatBody) -> Response:
        return await service.answer(http, body)

    def described() -> dict[str, Any]:
        return dict(id=service.model, object="model", created=service.created, owned_by="hrm_megatron",
                    max_model_len=service.session.decoder.context_tokens,
                    conditions=[*service.session.tokenizer.tag_ids])

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return dict(object="list", data=[described()])

    @app.get("/v1/models/{model:path}")
    async def model_of_name(model: str) -> dict[str, Any]:
        service.check_model(model)
        return described()

    @app.get("/health")
    async def health() -> Response:
        if service.live.failure:
            raise ApiError(500, service.live.failure)
        return JSONResponse(dict(status="ok"))

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(metrics_text(service.live, guard.statuses),
                                 media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def front() -> Response:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    _spell_errors(app)
    return guard


def _spell_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        refusal = of_validation([*error.errors()])
        return JSONResponse(refusal.body(), refusal.status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        refusal = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        failure = ApiError(500, f"{type(error).__name__} in the server; its log says more")
        return JSONResponse(failure.body(), 500, failure.headers)
