"""Build the whole parser outside of a run."""
from __future__ import annotations

import argparse
import importlib.metadata

from megatron.training import arguments as megatron_arguments

from hrm_megatron.training.arguments import add_hrm_arguments
from hrm_megatron.training.flags.help import prepare

VERSION = importlib.metadata.version("megatron-core")


def full_parser() -> argparse.ArgumentParser:
    """Return Megatron's parser with our group, as a run has it."""
    return prepare(add_hrm_arguments(megatron_arguments.add_megatron_arguments(
        argparse.ArgumentParser("hrm_megatron.pretrain", allow_abbrev=False))))
