"""Read a checkpoint of Megatron-FSDP by the names of all other layouts' checkpoints."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.safe_globals import SAFE_GLOBALS

from hrm_megatron.model.hrm import EMBEDDING_WEIGHT
from hrm_megatron.training.dcp import DCPFolder

COMMON = "common_state/shard_0_1"  # where torch_dist keeps what is no tensor
WEIGHT, OF_OPTIMIZER = "model.module.", "module.module.module."
STATE, GROUP = (f"optimizer.{kind}.{OF_OPTIMIZER}" for kind in ("state", "param_to_group_meta"))
GATE, UP = "_w", "_v"  # halves of the first layer of an MLP (fsdp_dtensor_checkpoint.py, handle_swiglu_in_state_dict)


def open_run(path: str | Path) -> DCPFolder:
    """Open the folder of an iteration that `hrm_megatron.pretrain` saved, whatever its format."""
    stored = DCPFolder(path)
    return MegatronFSDPFolder(path) if is_megatron_fsdp(stored) else stored


def is_megatron_fsdp(stored: DCPFolder) -> bool:
    """Tell whether Megatron-FSDP wrote this folder (`--ckpt-format fsdp_dtensor`)."""
    return any(key.startswith(WEIGHT) for key in DCPFolder.keys(stored))


class MegatronFSDPFolder(DCPFolder):
    """Its weights are the fp32 masters; the parts of the optimizer's state are called as elsewhere."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.sources: dict[str, list[str]] = {}
        for key in sorted(super().shapes(), reverse=True):  # the gate's half before the other
            if key.startswith(WEIGHT):
                name, prefix = key.removeprefix(WEIGHT), ""
            elif key.startswith(STATE):
                name, _, part = key.removeprefix(STATE).rpartition(".")
                prefix = f"optimizer.state.{part}."
            else:
                continue
            halved = name.endswith((f"weight{GATE}", f"weight{UP}"))
            self.sources.setdefault(prefix + (name[:-len(GATE)] if halved else name), []).append(key)
        self.args = super().object("args", SAFE_GLOBALS)

    def keys(self) -> list[str]:
        return [*self.sources, COMMON]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes()
        return {name: shapes[keys[0]] if len(keys) == 1 or self._whole(keys[0]) else
                (sum(shapes[key][0] for key in keys), *shapes[keys[0]][1:]) for name, keys in self.sources.items()}

    @staticmethod
    def _whole(key: str) -> bool:
        """Tell whether the key of a half holds both: stock code cuts no third state."""
        return key.endswith(".ema")

    def tensor(self, key: str) -> torch.Tensor:
        keys = self.sources.get(key, [key])
        tensor = super().tensor(keys[0])
        if len(keys) == 1:
            return tensor
        if not self._whole(keys[0]):
            return torch.cat([tensor, *(super(MegatronFSDPFolder, self).tensor(half) for half in keys[1:])])
        # Each tensor parallel rank's gate and other half, one after the other.
        return tensor.unflatten(0, (self.args.tensor_model_parallel_size, 2, -1)).transpose(0, 1).flatten(0, 2)

    def object(self, key: str, classes: Any = ()) -> Any:
        """Read a value; COMMON answers with the arguments, the iteration and the groups of the optimizer."""
        if key != COMMON:
            return super().object(key, classes)
        stored = DCPFolder.keys(self)
        groups = [{field: super(MegatronFSDPFolder, self).object(f"{GROUP}{name}.{field}")
                   for field in ("lr", "updates", "is_embedding") if f"{GROUP}{name}.{field}" in stored}
                  for name in ("output_layer.weight", EMBEDDING_WEIGHT)]
        return [{"args": self.args, "iteration": super().object("iteration"),
                 "optimizer": {"optimizer": {"param_groups": [group for group in groups if group]}}}]
