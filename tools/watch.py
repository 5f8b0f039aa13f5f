"""Watch a run in the terminal: progress, curves and checkpoints, read from its files, whether it is running or not.

    python tools/watch.py runs/XL
    python tools/watch.py runs/XL --once

The folder is the one that --save or --tensorboard-dir named, or the one around both. Ctrl-C ends it.
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.config import ConfigError
from hrm_megatron.monitoring.run_folder import RunFolder
from hrm_megatron.monitoring.scalars import Log


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS",
                        help="between looks (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    return parser


def watch(args: argparse.Namespace) -> None:
    if not args.every >= 0.1:
        raise ConfigError(f"--every {args.every}: must be at least 0.1 seconds")
    try:
        from rich.console import Console, RenderableType
        from rich.live import Live

        from hrm_megatron.monitoring.dashboard import frame
    except ModuleNotFoundError as error:
        raise ConfigError(f'tools/watch.py: needs {error.name}, which is not installed; pip install -e ".[monitor]"'
                          ) from error
    console = Console()
    log: Log | None = None

    def look() -> RenderableType:
        nonlocal log
        run = RunFolder.find(args.run)  # each time: a run that has just started may have no log or save yet
        if run.log and (log is None or log.folder != run.log):
            log = Log(run.log)
        return frame(run, log, time.time(), console.width)
    if args.once or not console.is_terminal:  # a pipe gets one frame after another
        console.print(look())
        while not args.once:
            time.sleep(args.every)
            console.print(look())
        return
    with Live(look(), console=console, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(args.every)
            live.update(look(), refresh=True)


def main() -> int:
    args = parser().parse_args()
    return one_line(lambda: watch(args))


if __name__ == "__main__":
    sys.exit(main())
