"""Tell all ranks about a signal to one of them, by all-reducing one number per step."""
from __future__ import annotations

import argparse

import torch
from megatron.training.dist_signal_handler import DistributedSignalHandler


def received_by_any(handler: DistributedSignalHandler) -> list[bool]:
    """Return [True] if any rank has received the signal, else [False].

    Stock code gathers a number from each rank and reads them one by one, on a GPU with one synchronization for each.
    """
    received = torch.tensor([handler._signal_received], dtype=torch.int32, device="cuda")
    torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
    return [bool(received.item())]


def install_exit_signal(args: argparse.Namespace) -> None:
    """Replace Megatron's check for signals if --exit-signal-handler is given."""
    if args.exit_signal_handler:
        DistributedSignalHandler.signals_received = received_by_any
