"""Temporarily swap the EMA and the weights, in place; swapping back restores every bit."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hrm_megatron.optim.sharded import parts_of


@contextlib.contextmanager
def averaged_weights(optimizer: Any, model_chunks: Sequence[Any]) -> Iterator[None]:
    """Let a model with a distributed optimizer compute with the EMA; all ranks enter and leave together.

    Masters and EMA are swapped one shard at a time, and the masters are then copied to the model's weights as after a
    step, so there is no second copy of the model. Only forward passes may run inside. After an exception nothing is
    swapped back, because other ranks may not take part in the all-gather of the weights: the process must end.
    """
    _exchange(optimizer, model_chunks)
    yield
    _exchange(optimizer, model_chunks)


@torch.no_grad()
def _exchange(optimizer: Any, model_chunks: Sequence[Any]) -> None:
    for part in parts_of(optimizer):
        if part.is_stub_optimizer:  # this rank owns no weights of this optimizer
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
