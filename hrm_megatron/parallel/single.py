"""Make this process the only rank of a Megatron world, for tools and tests that run without a launcher."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state, tensor_parallel


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """Provide a world of one rank while the block runs (gloo without CUDA, else NCCL), or use the existing one."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", rank=0, world_size=1,
                                         store=store)
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1234)  # Megatron's --seed
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
