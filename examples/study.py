"""Shared parts of studies of many small models on the demo's questions: command line, plan, data."""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.data.write_report import can_draw


def study_parser(description: str | None, output: str, quick: str) -> argparse.ArgumentParser:
    """Return a parser with --demo, --output (a folder in runs/) and --quick, whose help is `quick`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), metavar="DIR",
                        help="what the demo left: its questions as token ids (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs") / output, metavar="DIR",
                        help="folder for the results (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def check_pictures() -> None:
    """Refuse to start hours of work whose last step needs matplotlib if that is missing."""
    if not can_draw():
        raise ConfigError('the results are drawn by matplotlib, which is not installed; pip install -e ".[plan]"')


def chosen_plan[Plan: Any](args: argparse.Namespace, full: Plan, quick: Plan) -> Plan:
    """Return `quick` with --quick, else `full` with its fields replaced by the given flags."""
    given = {name: value for name in vars(full) if (value := getattr(args, name, None)) is not None}
    if args.quick and given:
        raise ConfigError(f"--quick has sizes of its own; leave it or --{next(iter(given)).replace('_', '-')} out")
    return quick if args.quick else dataclasses.replace(full, **given)


@dataclass(frozen=True)
class Questions:
    """The demo's questions as indexed datasets; `digest` identifies them."""

    train: Path
    valid: Path
    vocab_size: int
    digest: str

    @classmethod
    def of(cls, demo: Path) -> Questions:
        """Return those in the demo's folder; raises ConfigError if there are none."""
        train, valid = (demo / "stores" / name for name in ("train", "valid"))
        manifests = [prefix.with_suffix(".json") for prefix in (train, valid)]
        for path in (*manifests, demo / "tokenizer"):
            if not path.exists():
                raise ConfigError(f"--demo {demo}: no {path.relative_to(demo)} in it; run `make demo`, or give the "
                                  "folder of one")
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in manifests)).hexdigest()
        return cls(train, valid, TextTokenizer(demo / "tokenizer").vocab_size, digest)
