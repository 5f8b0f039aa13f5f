"""What benchmarks need of argparse: the type of counts (steps, rows, layers) and flags with a list of values."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def count(text: str) -> int:
    """Return a whole number of at least 1, as argparse's `type`."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1")
    return number


class Listed(argparse.Action):
    """A flag of several values that may be given more than once. Unlike those of "extend", its values replace the
    default."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: str | Sequence[Any] | None, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if before is self.default else before), *(values or ())])
