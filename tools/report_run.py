"""Write a report of a run as one HTML file: curves, evaluation, checkpoints, restarts, settings.

    python tools/report_run.py runs/XL --output runs/XL/report.html
    python tools/report_run.py runs/XL --output runs/XL/report.html --verify

The file needs no network and contains no scripts. It can be written at any time, also while the run trains.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hrm_megatron.program import check_outputs, listen, one_line, write_aside

if __name__ == "__main__":
    listen()

from hrm_megatron.checkpoint.archive import DamagedError
from hrm_megatron.config import ConfigError
from hrm_megatron.monitoring.run_folder import PARTIAL, RunFolder
from hrm_megatron.monitoring.scalars import read_log
from hrm_megatron.training.console_lines import thousands


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN",
                        help="folder that --save or --tensorboard-dir named, or the one around both")
    parser.add_argument("--output", type=Path, required=True, metavar="HTML")
    parser.add_argument("--verify", action="store_true",
                        help="read every byte of all saves and hold it against its checksum")
    return parser


def verified(run: RunFolder) -> dict[int, str]:
    """Read all checkpoints; return the result of the check by step."""
    from hrm_megatron.parallel.cpu import activate
    from hrm_megatron.parallel.log_levels import be_quiet

    be_quiet()
    activate()
    from hrm_megatron.checkpoint.verify import verify

    found = {}
    for save in run.saves():
        if save.state == PARTIAL:
            continue
        try:
            found[save.step] = f"verified, {thousands(verify(save.folder))}B"
        except DamagedError as error:
            found[save.step] = f"damaged: {error}"
    return found


def write(args: argparse.Namespace) -> None:
    check_outputs({"--output": args.output}, (".html", ".htm"))
    try:
        from hrm_megatron.monitoring.report import report
    except ModuleNotFoundError as error:
        raise ConfigError(f"--output {args.output}: needs {error.name}, which is not installed; pip install -e "
                          '".[monitor]"') from error
    run = RunFolder.find(args.run)
    log = read_log(run)
    write_aside(args.output, report(run, log, verified(run) if args.verify else {}))
    print(args.output, *log.damages(), sep="\n")


def main() -> int:
    args = parser().parse_args()
    return one_line(lambda: write(args))


if __name__ == "__main__":
    sys.exit(main())
