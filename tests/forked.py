"""How a process that a test's server has forked runs its work and ends."""
from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


def run_and_exit(work: Callable[[], object], report: Callable[[int], object] | None = None) -> NoReturn:
    """Run `work` and end this process as Python ends one, without returning to what the server had under way.

    `report` is called last, with the exit status.
    """
    status = 1
    try:
        status = _status(work)
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.main_thread():
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if report:
            report(status)
        os._exit(status)


def _status(work: Callable[[], object]) -> int:
    try:
        work()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
