"""The EMA in the place of the weights for a while: an exchange in place, after which every bit is where it was."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hrm_megatron.optim.sharded import parts_of


@contextlib.contextmanager
def averaged_weights(optimizer: Any, model_chunks: Sequence[Any]) -> Iterator[None]:
    """Let the model under a distributed optimizer compute with the EMA; all ranks enter and leave together.

    Masters and EMA change places, one weight's shard at a time, and the model's weights are made from the masters as
    after a step: there is no second copy of the model. Only forward passes may run inside. After an error nothing is
    put back, because the other ranks may not be there to gather weights with: such a process must end.
    """
    _exchange(optimizer, model_chunks)
    yield
    _exchange(optimizer, model_chunks)


@torch.no_grad()
def _exchange(optimizer: Any, model_chunks: Sequence[Any]) -> None:
    for part in parts_of(optimizer):
        if part.is_stub_optimizer:  # this rank has no weights of its kind
            continue
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                weight, ema = master.detach(), part.optimizer.init_state(master)["ema"]
                kept = weight.clone()
                weight.copy_(ema)
                ema.copy_(kept)
        part._copy_main_params_to_model_params()
    for chunk in model_chunks:
        chunk.start_param_sync(force_sync=True)
