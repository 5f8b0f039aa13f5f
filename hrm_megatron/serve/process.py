"""The server process: its address, and shutdown by signals."""
from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

import uvicorn

from hrm_megatron.config import ConfigError
from hrm_megatron.program import STOP_SIGNALS
from hrm_megatron.serve.guard import Guard

# Longer than clients keep idle connections (httpx 5 seconds, aiohttp 15, nginx 60): a request sent into a connection
# that the server has just closed is lost.
IDLE_SECONDS = 75
SHUTDOWN_SECONDS = 5  # for connections to close, once nothing is in flight
CONNECTIONS = 1024  # open at once, idle ones included; one more gets 503

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """Bind the address; port 0 is any free one."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {port}: must be from 0 (any free one) to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, kind)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error}); choose another") from error
    return place


def listen(place: socket.socket) -> None:
    """Start listening. Another server may have bound the same address (SO_REUSEADDR allows it until one listens)."""
    host, port = place.getsockname()[:2]
    try:
        place.listen()
    except OSError as error:
        raise ConfigError(f"--port {port}: {host} was taken while the model was read ({error}); choose another"
                          ) from error


def url_of(place: socket.socket) -> str:
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Cut(NamedTuple):
    """A second signal, and the number of requests it left unanswered."""

    signal: signal.Signals
    requests: int


class _Server(uvicorn.Server):
    """Drains at the first signal: requests in flight are answered, new ones get 503. The second signal ends at once:
    connections are aborted, and requests in flight end as if their clients had disconnected."""

    def __init__(self, config: uvicorn.Config, guard: Guard) -> None:
        super().__init__(config)
        self.guard = guard
        self.loop: asyncio.AbstractEventLoop | None = None
        self.signals = 0
        self.cut: Cut | None = None
        guard.on_drained = self._end

    def _end(self) -> None:
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals that end a program, except those that the caller ignores."""
        before = {number: signal.signal(number, self.handle_exit) for number in STOP_SIGNALS
                  if signal.getsignal(number) is not signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.loop is None:
            self.should_exit = True
        else:
            self.loop.call_soon_threadsafe(self._drain if self.signals == 1 else self._cut, sig)

    def _cut(self, sig: int) -> None:
        self.cut = self.cut or Cut(signal.Signals(sig), self.guard.in_flight)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self._end()

    def _drain(self, sig: int) -> None:
        log.warning("%s: %d requests in flight are answered, new ones refused", signal.Signals(sig).name,
                    self.guard.in_flight)
        self.guard.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


def serve(guard: Guard, place: socket.socket) -> Cut | None:
    """Serve until a signal; return what a second one cut off, if any."""
    config = uvicorn.Config(guard, log_level="warning", access_log=False, server_header=False,
                            timeout_keep_alive=IDLE_SECONDS, limit_concurrency=CONNECTIONS,
                            timeout_graceful_shutdown=SHUTDOWN_SECONDS)
    server = _Server(config, guard)
    server.run(sockets=[place])
    return server.cut
