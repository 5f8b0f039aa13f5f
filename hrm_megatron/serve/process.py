"""The server as a process: its address, and how signals end it."""
from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from types import FrameType

import uvicorn

from hrm_megatron.config import ConfigError
from hrm_megatron.serve.guard import Guard

KEEP_ALIVE_SECONDS = 5
CONNECTIONS = 1024  # open at once; one more is told 503

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """Take the address; port 0 is any free one."""
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
    """Let clients in. Another server may have taken the address since `bind`: it lets both in until one listens."""
    host, port = place.getsockname()[:2]
    try:
        place.listen()
    except OSError as error:
        raise ConfigError(f"--port {port}: {host} was taken while the model was read ({error}); choose another"
                          ) from error


def url_of(place: socket.socket) -> str:
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Drains at the first signal: answers in flight end, new requests are told 503. The second ends at once."""

    def __init__(self, config: uvicorn.Config, guard: Guard) -> None:
        super().__init__(config)
        self.guard = guard
        self.loop: asyncio.AbstractEventLoop | None = None
        guard.on_drained = self._end

    def _end(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.loop is None or self.guard.draining:
            self.should_exit = self.force_exit = True
        else:
            self.loop.call_soon_threadsafe(self._drain, sig)

    def _drain(self, sig: int) -> None:
        log.warning("%s: %d requests in flight are answered, new ones refused", signal.Signals(sig).name,
                    self.guard.in_flight)
        self.guard.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


def serve(guard: Guard, place: socket.socket) -> None:
    """Serve until a signal."""
    config = uvicorn.Config(guard, log_level="warning", access_log=False, server_header=False,
                            timeout_keep_alive=KEEP_ALIVE_SECONDS, limit_concurrency=CONNECTIONS,
                            timeout_graceful_shutdown=KEEP_ALIVE_SECONDS)
    _Server(config, guard).run(sockets=[place])
