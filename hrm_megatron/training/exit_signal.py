"""All ranks learn of a signal to one of them by one number of each step."""
from __future__ import annotations

import argparse

import torch
from megatron.training.dist_signal_handler import DistributedSignalHandler


def received_by_any(handler: DistributedSignalHandler) -> list[bool]:
    """Tell whether any rank has received the signal, as a list of one.

    Stock code gathers a number from each rank and reads all of them one by one, from a GPU with a wait for each.
    """
    received = torch.tensor([handler._signal_received], dtype=torch.int32, device="cuda")
    torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
    return [bool(received.item())]


def install_exit_signal(args: argparse.Namespace) -> None:
    """Let Megatron's loop ask all ranks at once, with --exit-signal-handler."""
    if args.exit_signal_handler:
        DistributedSignalHandler.signals_received = received_by_any
