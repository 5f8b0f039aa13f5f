"""Read streams ahead in threads, for libraries that release the GIL while reading, and yield them in order."""
from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, Queue

QUEUED = 8  # items per stream, read before their turn
DRAIN_SECONDS = 0.05


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class _End:
    pass


def read_ahead[T](streams: Iterable[Iterator[T]], threads: int) -> Iterator[T]:
    """Yield the items of one stream after the other; `threads` are read concurrently (1: without threads)."""
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
            while thread.is_alive():  # it may be blocked on a full queue
                with contextlib.suppress(Empty):
                    queue.get(timeout=DRAIN_SECONDS)


def _fill[T](stream: Iterator[T], queue: Queue[T | _Failed | type[_End]], stop: threading.Event) -> None:
    try:
        for item in stream:
            if stop.is_set():
                return
            queue.put(item)
        queue.put(_End)
    except BaseException as error:  # raised by the consumer, in order
        queue.put(_Failed(error))
