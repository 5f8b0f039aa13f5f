"""Progress display of finished answers on standard error."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from hrm_megatron.convert.ledger import progress
from hrm_megatron.generate.engine import Progress


@contextlib.contextmanager
def answer_count(total: int, title: str | None = None) -> Iterator[Callable[[Progress], object]]:
    """Yield the progress callback for `Session.answer`: a bar on a terminal, elsewhere a line now and then; nothing is
    shown for a single answer."""
    if total == 1:
        yield lambda progress: None
        return
    lead = f"{title}: " if title else ""
    with progress(total, describe=lambda done, total, _: f"{lead}{done} of {total} answers", desc=title, unit="answer",
                  delay=0.1) as passed:
        yield lambda progress: passed(progress.transcript.finish is not None)
