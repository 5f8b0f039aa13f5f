"""Set CUDA_DEVICE_MAX_CONNECTIONS as the layout of a run needs it, unless the user has exported it."""
from __future__ import annotations

import argparse
import os
from collections.abc import MutableMapping, Sequence

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def choose_connections(arguments: Sequence[str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variable to 1 for tensor or context parallelism, where Megatron relies on it to order communication
    before kernels (training/arguments.py, validate_args). FSDP keeps CUDA's default, because its all-gathers must
    overlap with kernels.

    The driver reads the variable at the first CUDA call, so this scans the raw command line before it is parsed.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tensor-model-parallel-size", "--context-parallel-size", dest="ranks", action="append",
                        default=[])
    parser.add_argument("--use-torch-fsdp2", "--use-megatron-fsdp", dest="fsdp", action="store_true")
    try:
        given, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return  # the real parser reports the error
    if not given.fsdp and any(ranks != "1" for ranks in given.ranks):
        environment.setdefault(CONNECTIONS, "1")
