"""Ports on which nobody else will listen before a test does.

A port that the kernel hands out (bind to 0) may be handed out again, as the near end of somebody's connection, between
the probe and its use. Ports outside of net.ipv4.ip_local_port_range are not; a lock, held until this process ends or
has asked for many more, keeps two test processes from the same one.
"""
from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from collections import deque
from pathlib import Path
from typing import IO

LOCAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST, END = 10_000, 65_536
_locks: deque[IO[str]] = deque(maxlen=64)  # files are few: the oldest lock ends


def candidates(first: int, last: int) -> list[int]:
    """Ports from LOWEST up that lie outside of first..last, the kernel's own; all from LOWEST up if none does."""
    return [port for port in range(LOWEST, END) if not first <= port <= last] or [*range(LOWEST, END)]


def free_port() -> int:
    """A port that is this process's alone, see above."""
    first, last = map(int, LOCAL_RANGE.read_text().split()) if LOCAL_RANGE.exists() else (32_768, 60_999)
    ports = candidates(first, last)
    random.SystemRandom().shuffle(ports)
    folder = Path(tempfile.gettempdir(), f"hrm-megatron-test-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for port in ports:
        lock = open(folder / str(port), "w")  # noqa: SIM115  # stays open: see _locks
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
        except OSError:  # another test's, or some service's
            lock.close()
            continue
        _locks.append(lock)
        return port
    raise OSError(f"no free port among {len(ports)}")
