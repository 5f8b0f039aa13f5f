"""Streams that threads read ahead, for libraries that read without Python's lock, and that come out in their order."""
from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, Queue

QUEUED = 8  # items of a stream that wait for those before it
DRAIN_SECONDS = 0.05


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class _End:
    pass


def read_ahead[T](streams: Iterable[Iterator[T]], threads: int) -> Iterator[T]:
    """Yield what one stream has, then what the next has, ...; `threads` of them are read at a time (1: none ahead)."""
    if threads == 1:
        for stream in streams:
            yield from stream
        return
    waiting, stop = iter(streams), threading.Event()
    reading: deque[tuple[Queue[T | _Failed | type[_End]], threading.Thread]] = deque()

    def begin(count: int) -> None:
        for stream in (stream for _, stream in zip(range(count), waiting, strict=False)):
            queue: Queue[T | _Failed | type[_End]] = Queue(QUEUED)
            thread = threading.Thread(target=_fill, args=(stream, queue, stop), daemon=True)
            thread.start()
            reading.append((queue, thread))

    try:
        begin(threads)
        while reading:
            item = reading[0][0].get()
            if item is _End:
                reading.popleft()
                begin(1)
            elif isinstance(item, _Failed):
                raise item.error
            else:
                yield item  # type: ignore[misc]
    finally:
        stop.set()
        for queue, thread in reading:
            while thread.is_alive():  # it may wait for room
                with contextlib.suppress(Empty):
                    queue.get(timeout=DRAIN_SECONDS)


def _fill[T](stream: Iterator[T], queue: Queue[T | _Failed | type[_End]], stop: threading.Event) -> None:
    try:
        for item in stream:
            if stop.is_set():
                return
            queue.put(item)
        queue.put(_End)
    except BaseException as error:  # the reader's to raise, in its turn
        queue.put(_Failed(error))
