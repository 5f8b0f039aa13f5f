"""Put the weights of a Megatron checkpoint into an HRMModel on one rank."""
from __future__ import annotations

from pathlib import Path

import torch

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.checkpoint.verify import naming_another
from hrm_megatron.convert.checkpoint import EMA, Checkpoint
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.transformer_config import hrm_config


@torch.no_grad()
def load_model(checkpoint: Checkpoint, kind: str = EMA) -> HRMModel:
    """Build the model of `checkpoint` in fp32 with its weights of this kind ("ema" or "raw")."""
    model = HRMModel(hrm_config(checkpoint.architecture), seed=0)
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with naming_another(checkpoint.path):
        for name, tensor in checkpoint.weights(kind):
            places.pop(name).copy_(tensor)
    assert not places, f"weights that the checkpoint does not name: {sorted(places)}"
    return model.eval()


def open_checkpoint(load: str | Path, step: int | None = None, verify: bool = True) -> Checkpoint:
    """Open the latest checkpoint (or that of `step`) under the folder that `--save` named."""
    iteration = find_iteration(load, step)
    with naming_another(iteration):
        return read_megatron(iteration, verify)
