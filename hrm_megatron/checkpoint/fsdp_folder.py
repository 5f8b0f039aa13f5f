"""Read a Megatron-FSDP checkpoint under the names that all other layouts use."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.safe_globals import SAFE_GLOBALS

from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.model.hrm import EMBEDDING_WEIGHT
from hrm_megatron.optim.adam_atan2 import UPDATES, state_key
from hrm_megatron.optim.sharded import EMBEDDING

COMMON = "common_state/shard_0_1"  # where torch_dist keeps everything that is not a tensor
WEIGHT, OF_OPTIMIZER = "model.module.", "module.module.module."
STATE, GROUP = (f"optimizer.{kind}.{OF_OPTIMIZER}" for kind in ("state", "param_to_group_meta"))
GATE, UP = "_w", "_v"  # halves of the first layer of an MLP (fsdp_dtensor_checkpoint.py, handle_swiglu_in_state_dict)


def open_run(path: str | Path, verify: bool = True) -> DCPFolder:
    """Open an iteration's folder saved by `hrm_megatron.pretrain`, in either format."""
    stored = DCPFolder(path, verify)
    return MegatronFSDPFolder(path, verify) if is_megatron_fsdp(stored) else stored


def is_megatron_fsdp(stored: DCPFolder) -> bool:
    """Return whether Megatron-FSDP wrote this folder (`--ckpt-format fsdp_dtensor`)."""
    return any(key.startswith(WEIGHT) for key in DCPFolder.keys(stored))


class MegatronFSDPFolder(DCPFolder):
    """The weights are the fp32 masters; parts of the optimizer state have the names that other layouts use."""

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        super().__init__(path, verify)
        self.sources: dict[str, list[str]] = {}
        for key in sorted(super().shapes(), reverse=True):  # the gate half (_w) before the up half (_v)
            if key.startswith(WEIGHT):
                name, prefix = key.removeprefix(WEIGHT), ""
            elif key.startswith(STATE):
                name, _, part = key.removeprefix(STATE).rpartition(".")
                prefix = state_key(part, "")
            else:
                continue
            self.sources.setdefault(prefix + name.removesuffix(GATE).removesuffix(UP), []).append(key)
        self.args = super().object("args", SAFE_GLOBALS)

    def keys(self) -> list[str]:
        return [*self.sources, COMMON]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stored = super().shapes()
        return {name: (sum(stored[key][0] for key in self._parts(name)), *stored[keys[0]][1:])
                for name, keys in self.sources.items()}

    def _parts(self, name: str) -> list[str]:
        """Return the keys of the tensors that make up this one; the `ema` of either half is already the whole."""
        keys = self.sources.get(name, [name])
        return keys[:1] if keys[0].endswith(".ema") else keys

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor, concatenated from its halves."""
        parts = [DCPFolder.tensor(self, part) for part in self._parts(key)]
        if len(parts) == len(self.sources.get(key, parts)):
            return torch.cat(parts)
        # Stock code does not split a third state: it holds gate and up half of each tensor-parallel rank in turn.
        return parts[0].unflatten(0, (self.args.tensor_model_parallel_size, 2, -1)).transpose(0, 1).flatten(0, 2)

    def object(self, key: str, classes: Sequence[Any] = ()) -> Any:
        """Read a value; COMMON returns the arguments, the iteration and the parameter groups of the optimizer."""
        if key != COMMON:
            return super().object(key, classes)
        stored, groups = DCPFolder.keys(self), []
        for name in ("output_layer.weight", EMBEDDING_WEIGHT):
            fields = {field: f"{GROUP}{name}.{field}" for field in ("lr", UPDATES, EMBEDDING)}
            groups.append({field: super(MegatronFSDPFolder, self).object(place) for field, place in fields.items()
                           if place in stored})
        return [{"args": self.args, "iteration": super().object("iteration"),
                 "optimizer": {"optimizer": {"param_groups": [group for group in groups if group]}}}]
