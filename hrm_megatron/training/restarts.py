"""Starts and restarts by a launcher: required settings, and helper processes that end with their rank."""
from __future__ import annotations

import atexit
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

from hrm_megatron.config import ConfigError

NOT_SHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def check_restarts(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse restarts that would hang: restarted ranks find the addresses of dead ones in the store that torchrun's
    agent shares across restarts (pytorch issue 135712)."""
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(f"torchrun --max-restarts {restarts}: would hang at the first restart, in which ranks find "
                          f"the addresses of dead ones; export {NOT_SHARED}=1, and with several nodes give "
                          "--rdzv-backend c10d")


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to train without a launcher, which sets the rendezvous address."""
    if "MASTER_ADDR" not in environment:
        raise ConfigError("MASTER_ADDR is not set: no launcher has said where ranks meet; start by torchrun "
                          "--nproc-per-node 1 -m hrm_megatron.pretrain ..., or by launch_scripts/train_node.sh")


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however it ends, and ignore signals until then: torchrun
    sends SIGTERM to all processes of a rank, which still needs this one for its last save."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def results_queue(mp_mode: str) -> Any:
    """Megatron's `get_write_results_queue`, with a process that ends with its rank; the stock one outlives a killed
    rank and keeps its sockets and GPU memory."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()
    return filesystem_async._results_queue


def save_in_background(*arguments: Any) -> None:
    """Megatron's checkpoint writer process, which here ends with its rank."""
    end_with_parent()
    _stock_loop(*arguments)


_stock_loop = async_utils.PersistentAsyncCaller.async_loop


def start_fork_server() -> None:
    """Start the fork server from which Megatron forks its checkpoint writer, so that it ignores the same signals as its
    children, which would end with it. Ignored signals stay ignored across exec."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def kill_writer() -> None:
    """Kill the checkpoint writer when the rank exits: multiprocessing would send it a signal that it ignores, and wait
    for it."""
    if writer := async_utils.PersistentAsyncCaller._persistent_process:
        writer.kill()


def end_helpers_with_their_rank(in_background: bool) -> None:
    """Let the processes that Megatron's checkpointing starts end with the rank, and not before."""
    if in_background:
        start_fork_server()
        atexit.register(kill_writer)  # runs before multiprocessing's older handler
    stock = filesystem_async.get_write_results_queue
    mode = stock.keywords["mp_mode"] if isinstance(stock, functools.partial) else "spawn"  # parallel/cpu.py forks it
    filesystem_async.get_write_results_queue = functools.partial(results_queue, mp_mode=mode)
    async_utils.PersistentAsyncCaller.async_loop = staticmethod(save_in_background)
