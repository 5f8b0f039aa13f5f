"""ASGI middleware before every request: API key, body size, timeouts, and draining at shutdown."""
from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from hrm_megatron.serve.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health")  # do not need a key
ANSWERS = ("/v1/completions", "/v1/chat/completions")
GONE = 499  # the client disconnected; only the metrics show it
BODY_SECONDS = 30.0  # for a body to arrive
UNREAD_SECONDS = 10.0  # after the answer's timeout, for a client to read its end


@dataclass(frozen=True)
class Limits:
    """Limits of one request. `timeout_seconds` is for its answers, waiting included."""

    body_bytes: int = 4 << 20
    timeout_seconds: float = 600.0


class Guard:
    """ASGI middleware. After `drain` new requests are refused with 503, and `on_drained` is called when none is in
    flight."""

    def __init__(self, app: App, limits: Limits, api_key: str | None = None) -> None:
        self.app, self.limits, self.api_key = app, limits, api_key
        self.in_flight = 0
        self.draining = False
        self.on_drained: Callable[[], object] = lambda: None
        self.statuses: Counter[tuple[str, int]] = Counter()

    def drain(self) -> None:
        self.draining = True
        if not self.in_flight:
            self.on_drained()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        status: int | None = None
        whole = False
        self.in_flight += 1

        async def noting(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)
        try:
            async with asyncio.timeout(self.limits.timeout_seconds + UNREAD_SECONDS):
                body = await self._admit(scope, receive)
                if scope["method"] == "HEAD":  # handled as GET; the server omits the body
                    scope = {**scope, "method": "GET"}
                await self.app(scope, _after(body, receive), noting)
        except ApiError as error:
            await refuse(error, noting)
        except TimeoutError:  # the client does not read: the connection is closed
            if status is None:
                await refuse(ApiError(504, "no answer in time"), noting)
        finally:
            self.in_flight -= 1
            path = scope["path"] if scope["path"] in ANSWERS else "other"
            self.statuses[path, state.get("failed", status) if status and whole else GONE] += 1
            if self.draining and not self.in_flight:
                self.on_drained()

    async def _admit(self, scope: Scope, receive: Receive) -> bytes:
        """Return the whole body of a request that is admitted; raises ApiError otherwise."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.draining:
            raise ApiError(503, "the server is ending; it takes no more requests")
        if self.api_key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not secrets.compare_digest(  # RFC 9110, 11.1: case-insensitive
                    given.strip().encode("latin-1"), self.api_key.encode()):
                raise ApiError(401, "Authorization: no or another API key; send it as 'Bearer KEY'",
                               code="invalid_api_key")
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self.limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await self._body(receive)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive in {BODY_SECONDS:.0f} seconds") from error

    async def _body(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ApiError(GONE, "the client went away")
            body += message.get("body", b"")
            if len(body) > self.limits.body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.limits.body_bytes} bytes; send less at once")


def _after(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first replays a body that has been read."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()
    return again


async def refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close",
               **error.headers}
    await send({"type": "http.response.start", "status": error.status,
                "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()]})
    await send({"type": "http.response.body", "body": body})
