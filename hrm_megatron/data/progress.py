"""Progress of data tools: a bar on a terminal, log lines elsewhere."""
from __future__ import annotations

import logging
import time
from typing import Never, Self

from tqdm import tqdm

LINE_SECONDS = 60.0  # between progress lines without a terminal

log = logging.getLogger(__name__)


def show_log() -> None:
    """Send log messages to stderr, our own from level INFO on."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hrm_megatron").setLevel(logging.INFO)
    logging.getLogger("hrm_megatron.data.plan").setLevel(logging.WARNING)  # it logs epochs, which concern training only


class Bar:
    """A progress bar for some unit; without a terminal, the same as a periodic log line."""

    def __init__(self, unit: str, unit_scale: bool = False) -> None:
        self._unit, self._unit_scale = unit, unit_scale
        self._bar: tqdm[Never] = tqdm(unit=unit, unit_scale=unit_scale, disable=None)
        self.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def begin(self, total: float | None = None) -> None:
        """Start or restart the count and the clock."""
        self._bar.reset(total)
        self._done, self._total = 0, total
        self._started, self._said = time.monotonic(), 0.0

    def advance(self, more: int = 1, note: str = "") -> None:
        self._done += more
        self._bar.update(more)
        if note:
            self._bar.set_postfix_str(note)
        if self._bar.disable and (seconds := self.seconds) - self._said >= LINE_SECONDS:
            self._said = seconds
            line = tqdm.format_meter(self._done, self._total, seconds, ncols=0, unit=self._unit,  # type: ignore[arg-type]
                                     unit_scale=self._unit_scale, postfix=note or None)
            log.info("%s", line.strip())


class Progress(Bar):
    """Progress of a run: `read_bytes` of its sources, and `tokens` made from them in `seconds`."""

    def __init__(self) -> None:
        self.read_bytes = self.tokens = 0
        super().__init__("B", unit_scale=True)

    def made(self, read_bytes: int, tokens: int) -> None:
        self.read_bytes += read_bytes
        self.tokens += tokens
        self.advance(read_bytes, f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s")
