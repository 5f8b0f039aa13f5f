"""The command line of benchmarks that measure synthetic datasets by number of examples."""
from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from hrm_megatron.benchmark.count import Listed


def measure_millions(name: str, description: str | None, columns: Sequence[str],
                     measure: Callable[[Path, int], list[str]], check: Callable[[], object] = lambda: None) -> None:
    """Print a row of `measure(folder, examples)` for each of --millions; `check` is called before the folder is
    created."""
    parser = argparse.ArgumentParser(prog=f"tools/benchmark.py {name}",
                                     description=description.splitlines()[0] if description else None)
    parser.add_argument("--millions", type=float, nargs="+", action=Listed, default=[1, 10], help="of examples")
    parser.add_argument("--output", type=Path, default=Path(f"benchmark-{name}"), metavar="DIR",
                        help="a new folder for made-up datasets of 56 bytes an example, removed at the end")
    args = parser.parse_args()
    check()
    args.output.mkdir(parents=True)
    try:
        print(" | ".join(columns))
        for millions in args.millions:
            print(" | ".join(measure(args.output, int(millions * 1e6))), flush=True)
    finally:
        shutil.rmtree(args.output)
