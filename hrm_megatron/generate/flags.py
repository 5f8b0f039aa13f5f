"""Flags of the tools that generate: the model, and how it computes."""
from __future__ import annotations

import argparse
from pathlib import Path

from hrm_megatron.convert.checkpoint import EMA, RAW
from hrm_megatron.parallel.precision import DTYPES

Flags = argparse.ArgumentParser | argparse._ArgumentGroup


def add_model_flags(p: Flags, verb: str = "answer from") -> None:
    p.add_argument("--load", type=Path, required=True,
                   help="folder that --save named, or one iteration in it; a transformers folder; one of HRM-Text")
    p.add_argument("--ckpt-step", type=int, help="iteration (Megatron) or epoch (HRM-Text) instead of the latest")
    p.add_argument("--no-verify-checkpoint", dest="verify_checkpoint", action="store_false",
                   help=f"{verb} what can be read of a damaged checkpoint")
    p.add_argument("--weights", choices=[EMA, RAW], help="(default: ema, or raw where there is no other)")
    p.add_argument("--tokenizer-model", type=Path,
                   help="tokenizer folder of the training data (default: the one beside the model)")


def add_compute_flags(p: Flags) -> None:
    p.add_argument("--h-cycles", type=int, help="(default: as in training)")
    p.add_argument("--l-cycles", type=int, help="(default: as in training)")
    p.add_argument("--exit-threshold", type=float, metavar="X",
                   help="let the H cycles of an answer end with the first that changes z_H of its prompt by less than "
                        "X times its norm; --h-cycles is the most (default: all are run)")
    p.add_argument("--dtype", choices=[*DTYPES], default="float32", help="of weights and cache")
