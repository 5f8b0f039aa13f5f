"""A rank that saves in the background by Megatron's process for it, is told to stop, saves again, and fails."""
import os
import signal
import sys
from pathlib import Path

import torch

torch.cuda.device_count = lambda: 1  # in the writer too, which imports this module
torch.cuda.set_device = lambda device: None
torch.cuda.current_device = lambda: "cpu"

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest  # noqa: E402

from hrm_megatron.training.restarts import end_helpers_with_their_rank  # noqa: E402


def save(queue, path):
    queue.schedule_async_request(AsyncRequest(Path.touch, (path,), []))
    queue.maybe_finalize_async_calls(blocking=True)
    print(path.name, flush=True)


def main(folder):
    signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    end_helpers_with_their_rank(in_background=True)
    AsyncCallsQueue.warmup_persistent_caller(0, mp_mode="forkserver")  # megatron.training.initialize
    queue = AsyncCallsQueue(persistent=True)
    save(queue, folder / "first")
    os.killpg(os.getpid(), signal.SIGTERM)  # as torchrun does
    save(queue, folder / "second")
    print("fails", flush=True)
    sys.exit(3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
