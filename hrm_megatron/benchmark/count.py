"""The argparse type of counts: steps, rows, layers and so on."""
from __future__ import annotations

import argparse


def count(text: str) -> int:
    """Return a whole number of at least 1, as argparse's `type`."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1")
    return number
