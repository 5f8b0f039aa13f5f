"""LoRA: fine-tune low-rank adapters on the shared weights of both stacks instead of all weights."""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch

from hrm_megatron.config import LoRA
from hrm_megatron.layers.linear import OwnLinear
from hrm_megatron.layers.lora import Adapter, merged
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.model.initialize import draw, shard
from hrm_megatron.parallel.patching import temporarily


def adapt(model: HRMModel, lora: LoRA, seed: int) -> None:
    """Freeze the model and add adapters to the layers that `lora` targets. B = 0, so the function is unchanged.

    Every tick of a stack uses the same adapters, so their gradient is summed over ticks like that of the weights. A is
    drawn from seed and name with the LeCun standard deviation, so that every parallel layout starts alike.
    """
    model.requires_grad_(False)
    for name, layer in model.named_modules():
        if isinstance(layer, OwnLinear) and name.split(".")[-1] in lora.targets:
            layer.lora = Adapter(layer, lora)
    with torch.no_grad():
        for name, weight in model.named_global_parameters():
            if name.endswith(".lora.A") and not weight.is_meta:
                cut = getattr(weight, "tensor_model_parallel", False)
                columns = weight.shape[1] * (model.tp_group.size() if cut else 1)
                full = draw(seed, name, (lora.rank, columns)) / math.sqrt(columns)
                weight.copy_(shard(full, weight, model.tp_group.rank(), model.tp_group.size()))


@torch.no_grad()
def merged_weights(model: HRMModel) -> dict[str, torch.Tensor]:
    """Return all tensors of a model on one rank by name, with the adapters merged into their weights."""
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, layer in model.named_modules():
        if isinstance(layer, OwnLinear) and layer.lora is not None:
            a, b = (tensors.pop(f"{name}.lora.{factor}").float() for factor in "AB")
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = merged(weight, a, b, layer.lora.scale).to(weight.dtype)
    return tensors


@contextlib.contextmanager
def without_adapters(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Detach the adapters within the block, to load a checkpoint that has none."""
    with contextlib.ExitStack() as stack:
        for layer in (layer for model in models for layer in model.modules() if isinstance(layer, OwnLinear)):
            stack.enter_context(temporarily(layer, lora=None))
        yield
