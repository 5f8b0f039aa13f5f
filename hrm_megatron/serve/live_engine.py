"""Run the engine in its own thread: requests are added and cancelled while it runs, and tokens go to the event loop."""
from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from hrm_megatron.generate.engine import Engine, Request
from hrm_megatron.generate.transcript import Finish, TokenLogprob
from hrm_megatron.serve.errors import ApiError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """A snapshot of the effect of one more token: the engine's thread keeps changing the transcript."""

    prompt: int
    sample: int
    given: bool  # whether the request gave the token
    piece: str
    finish: Finish | None
    logprob: TokenLogprob | None


@dataclass(eq=False)
class Ticket:
    """Places for `prompts` prompts of one request. Iterating yields events until every sample has finished, or raises
    ApiError."""

    prompts: int
    loop: asyncio.AbstractEventLoop
    timeout_seconds: float
    requests: list[Request] = field(default_factory=list)
    events: asyncio.Queue[Event | ApiError] = field(default_factory=asyncio.Queue)
    numbers: dict[int, int] = field(default_factory=dict)  # the engine's number > index in `requests`

    async def __aiter__(self) -> AsyncIterator[Event]:
        left = sum(request.samples for request in self.requests)
        deadline = self.loop.time() + self.timeout_seconds
        while left:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await self.events.get()
            except TimeoutError as error:
                raise ApiError(504, f"the answer took more than {self.timeout_seconds:g} seconds; ask for fewer "
                                    "tokens") from error
            if isinstance(event, ApiError):
                raise event
            left -= event.finish is not None
            yield event


Order = tuple[Literal["submit", "cancel"], Ticket]


class LiveEngine:
    """Runs an engine until `close`. At most `max_prompts` prompts are running or waiting."""

    def __init__(self, engine: Engine, max_prompts: int) -> None:
        self.engine, self.max_prompts = engine, max_prompts
        self.failure: str | None = None
        self.prompts = 0  # of open tickets; used by the event loop only
        self.completion_tokens = 0
        self._open: set[Ticket] = set()
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._by_number: dict[int, Ticket] = {}  # used by the thread only
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def open(self, prompts: int, timeout_seconds: float) -> Ticket:
        """Reserve places for `prompts` prompts; raises ApiError if there are too few now."""
        if self.failure:
            raise ApiError(500, self.failure)
        if prompts > self.max_prompts:
            raise ApiError(400, f"prompt: {prompts} prompts at once; send at most {self.max_prompts}", "prompt")
        if self.prompts + prompts > self.max_prompts:
            raise ApiError(429, f"{self.prompts} prompts are being answered or wait, of at most {self.max_prompts}; "
                                "try again later")
        ticket = Ticket(prompts, asyncio.get_running_loop(), timeout_seconds)
        self._open.add(ticket)
        self.prompts += prompts
        return ticket

    def submit(self, ticket: Ticket, requests: list[Request]) -> None:
        """Queue the prompts of a ticket; raises ConfigError if one can never be answered."""
        for request in requests:
            self.engine.check(request)
        ticket.requests = requests
        self._orders.put(("submit", ticket))

    def release(self, ticket: Ticket) -> None:
        """Release the places of a ticket and cancel its unfinished answers."""
        if ticket in self._open:
            self._open.remove(ticket)
            self.prompts -= ticket.prompts
            self._orders.put(("cancel", ticket))

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_orders():
                self._step()
        except Exception as error:
            log.exception("the engine stopped")
            self.failure = f"the engine stopped: {error}"
            for ticket in {*self._by_number.values()}:
                self._send(ticket, ApiError(500, self.failure))
            self._refuse_the_rest()

    def _take_orders(self) -> bool:
        """Carry out all queued orders, waiting for one if the engine is idle; return False when closed."""
        while True:
            try:
                order = self._orders.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if order is None:
                return False
            what, ticket = order
            if what == "submit":
                for place, request in enumerate(ticket.requests):
                    number = self.engine.submit(request)
                    ticket.numbers[number], self._by_number[number] = place, ticket
            else:
                for number in ticket.numbers:
                    self.engine.cancel(number)
                    self._by_number.pop(number, None)

    def _step(self) -> None:
        events: dict[Ticket, list[Event | ApiError]] = {}
        for progress in self.engine.step():
            ticket, transcript = self._by_number[progress.request], progress.transcript
            place = ticket.numbers[progress.request]
            if transcript.finish == "failed":
                log.warning("the logits of a prompt are not finite")
                events.setdefault(ticket, []).append(ApiError(
                    500, f"prompt {place}: the model's logits are not finite; send another, or serve other weights"))
                continue
            request = ticket.requests[place]
            given = len(transcript.tokens) <= len(request.given)
            self.completion_tokens += not given
            events.setdefault(ticket, []).append(Event(
                place, progress.sample, given, progress.piece, transcript.finish,
                transcript.logprobs[-1] if transcript.logprobs else None))
        for ticket, found in events.items():
            self._send(ticket, *found)

    def _refuse_the_rest(self) -> None:
        while (order := self._orders.get()) is not None:
            if order[0] == "submit":
                self._send(order[1], ApiError(500, self.failure or ""))

    def _send(self, ticket: Ticket, *events: Event | ApiError) -> None:
        def put() -> None:
            for event in events:
                ticket.events.put_nowait(event)
        if not ticket.loop.is_closed():  # closed if the server ends without waiting for its clients
            ticket.loop.call_soon_threadsafe(put)
