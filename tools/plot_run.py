"""Draw the curves of a run, or of several runs in one picture, from their TensorBoard logs.

    python tools/plot_run.py runs/XL --output curves.png
    python tools/plot_run.py runs/raw runs/no_warmup --output compared.png

Norms of z_H and z_L by tick are included if the run had --log-hrm-norms.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hrm_megatron.program import check_outputs, listen, one_line, write_aside

if __name__ == "__main__":
    listen()

from hrm_megatron.config import ConfigError
from hrm_megatron.monitoring.run_folder import RunFolder
from hrm_megatron.monitoring.scalars import read_log


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                        help="folder that --save or --tensorboard-dir named, or the one around both")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    return parser


def plot(args: argparse.Namespace) -> None:
    check_outputs({"--output": args.output}, (".png",))
    try:
        from hrm_megatron.monitoring.picture import draw
    except ModuleNotFoundError as error:
        raise ConfigError(f"--output {args.output}: needs {error.name}, which is not installed; pip install -e "
                          '".[monitor]"') from error
    folders = [RunFolder.find(folder) for folder in args.runs]
    names = [run.name for run in folders]
    labels = [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, folders, strict=True)]
    if len({*labels}) < len(labels):
        raise ConfigError(f"{args.runs[0]}: a run is given twice; leave one out")
    logs = {label: read_log(run) for label, run in zip(labels, folders, strict=True)}
    write_aside(args.output, draw({label: log.curves() for label, log in logs.items()}, ", ".join(labels)))
    print(args.output, *(damage for log in logs.values() for damage in log.damages()), sep="\n")


def main() -> int:
    args = parser().parse_args()
    return one_line(lambda: plot(args))


if __name__ == "__main__":
    sys.exit(main())
