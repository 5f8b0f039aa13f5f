"""What stock Megatron and torch have, told by a fresh process; run as a program by test_patches.py.

Reads [[module, attribute], ...] as JSON from stdin. The last line on stdout is a JSON object: `found` lists what is at
those places, `fault` whether the loader that we repair records gradients, `late` what activate() says now,
`replaced` and `invented` the names of torch that the patches changed and those it never had.
"""
from __future__ import annotations

import importlib
import inspect
import json
import sys
from typing import Any

import torch

PLACES = {"torch": torch, "torch.cuda": torch.cuda, "torch.cuda.random": torch.cuda.random,
          "torch.cuda.nvtx": torch.cuda.nvtx, "torch.distributed": torch.distributed,
          "torch.distributed.DeviceMesh": torch.distributed.DeviceMesh, "torch.Tensor": torch.Tensor,
          "torch.nn.Module": torch.nn.Module}


def describe(module: str, attribute: str) -> str:
    """Signature without annotations, value of a constant, or "gone"."""
    try:
        place: Any = importlib.import_module(module)
        for name in attribute.split("."):
            place = inspect.getattr_static(place, name) if inspect.isclass(place) else getattr(place, name)
    except (ImportError, AttributeError):
        return "gone"
    if isinstance(place, (property, bool)):
        return type(place).__name__
    if isinstance(place, (str, tuple)):
        return repr(place)
    if isinstance(place, torch._ops.OpOverloadPacket):
        return str(place.default._schema)
    signature = inspect.signature(place.__func__ if isinstance(place, classmethod) else place)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def loader_records_gradients() -> bool:
    """Call DistributedOptimizer.load_parameter_state_from_dp_reshardable up to its first look at the state."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    class Seen(Exception): ...

    class State:
        def __contains__(self, key: str) -> bool:
            raise Seen(torch.is_grad_enabled())

    try:
        DistributedOptimizer.load_parameter_state_from_dp_reshardable(None, State())
    except Seen as seen:
        return bool(seen.args[0])
    raise AssertionError("the loader never looked at its state")


def main() -> None:
    found = [describe(module, attribute) for module, attribute in json.load(sys.stdin)]
    fault = loader_records_gradients()
    from hrm_megatron.parallel import cpu

    try:
        cpu.activate()
        late = "nothing"
    except RuntimeError as error:
        late = str(error)
    before = {name: {key: getattr(place, key) for key in dir(place)} for name, place in PLACES.items()}
    for patch in (cpu._patch_tensors, cpu._patch_cuda_module, cpu._patch_process_groups):
        patch()
    changed = [(name, key) for name, place in PLACES.items() for key in vars(place)
               if key not in before[name] or getattr(place, key) is not before[name][key]]
    print(json.dumps(dict(
        found=found, fault=fault, late=late,
        replaced=[f"{name}.{key}" for name, key in changed],
        invented=[f"{name}.{key}" for name, key in changed if key not in before[name]])))


if __name__ == "__main__":
    main()
