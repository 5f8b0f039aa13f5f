"""The type of a command line's numbers of steps, rows, layers and the like."""
from __future__ import annotations

import argparse


def count(text: str) -> int:
    """Read a whole number from 1, as argparse's `type`."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1")
    return number
