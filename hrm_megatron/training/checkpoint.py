"""Refuse a checkpoint that does not fit the run, before Megatron builds anything."""
from __future__ import annotations

import argparse


def check_checkpoint(args: argparse.Namespace) -> None:
    return
