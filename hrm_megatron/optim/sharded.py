"""Megatron's optimizers with the EMA as a third state tensor and AdamATan2's update counts; all save their state keyed
by parameter name."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, count, repeat
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.utils import to_local_if_dtensor

from hrm_megatron.optim.adam_atan2 import STATE_KEYS, UPDATES, AdamATan2, init_states, state_prefix
from hrm_megatron.optim.flat import Shard
from hrm_megatron.optim.whole_weights import Bucket, parts_of_bucket

# Checkpoint metadata that makes the distributed optimizer save by parameter name (distrib_optimizer.py).
BY_NAME = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
EMBEDDING = "is_embedding"
PARTS = ("param", *STATE_KEYS)  # the master and its state


def parts_of(optimizer: Any) -> list[Any]:
    """List the optimizers inside Megatron's ChainedOptimizer; for any other optimizer, itself."""
    found: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return found


def set_updates(optimizer: torch.optim.Optimizer, saved_groups: Iterable[dict[str, Any]]) -> None:
    """Set the update counts, of the embedding and of all other weights, from the param groups of a checkpoint."""
    updates = {bool(group.get(EMBEDDING)): group[UPDATES] for group in saved_groups}
    for group in optimizer.param_groups:
        group[UPDATES] = updates[bool(group.get(EMBEDDING))]


def settings_of_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the param groups without their parameters, as they are saved in checkpoints."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


class EMADistributedOptimizer(DistributedOptimizer):  # type: ignore[misc]
    """Megatron's DistributedOptimizer with the EMA registered as a third state tensor; the stock class silently drops
    the EMA when it loads a checkpoint.

    Masters and state are flat buffers laid out like DDP's, so a step is one update per group. For fp32 weights, whose
    masters are DDP's buffers, it is one per group and bucket. Megatron-FSDP has its own buffers.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.is_stub_optimizer or self.ddp_config.use_megatron_fsdp:
            return
        for weights, masters, movable in (*zip(self.model_fp32_groups, self.shard_fp32_groups, repeat(False)),
                                          *zip(self.model_float16_groups, self.shard_fp32_from_float16_groups,
                                               repeat(True))):
            self.optimizer.lay_out(masters, [self._shard(weight) for weight in weights], movable)

    def _shard(self, weight: torch.nn.Parameter) -> Shard:
        buffer, _, bucket = self.model_param_gbuf_map[weight]
        place = self._get_model_param_range_map(weight)["gbuf_world"]
        return Shard((buffer, bucket), place.start, place.end)

    def _copy_main_params_to_model_params(self) -> None:
        """Cast the masters to the model's weights by one call; stock code makes one call per weight."""
        if self.is_stub_optimizer or self.ddp_config.use_megatron_fsdp or self.ddp_config.fp8_param_gather:
            super()._copy_main_params_to_model_params()
        elif weights := [*chain(*self.shard_float16_groups)]:  # those in fp32 are the masters
            torch._foreach_copy_(weights, [*chain(*self.shard_fp32_from_float16_groups)])

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        return STATE_KEYS

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the update counts from the checkpoint and all other settings of the groups from the command line.

        Stock code identifies a saved group by its learning rates, among other keys, and raises KeyError if they have
        changed.
        """
        if self.ddp_config.use_megatron_fsdp:  # its tensors were loaded in place
            set_updates(self.optimizer, state_dict["param_to_group_meta"].values())
            return
        set_updates(self.optimizer, state_dict["optimizer"]["param_groups"])
        init_states(self.optimizer)  # in the flat buffers; stock code would first allocate others
        if "param_state_sharding_type" in state_dict:  # Megatron drops the empty dict of a rank without weights
            state_dict = {"param_state": {}, **state_dict}
        super().load_state_dict({**state_dict, "optimizer": {
            **state_dict["optimizer"], "param_groups": settings_of_groups(self.optimizer)}})

    def _init_optimizer_states_with_dummy_values(self) -> None:
        init_states(self.optimizer)  # stock code takes a dummy optimizer step before Megatron-FSDP loads

    def _buckets(self) -> Iterator[tuple[dict[int, torch.nn.Parameter], Bucket]]:
        """Yield for each bucket, in buffer order, its weights by number and its `Bucket`."""
        numbers = count()
        for buffer in self.buffers:
            weights: list[dict[int, torch.nn.Parameter]] = [{} for _ in buffer.buckets]
            places: list[dict[int, tuple[int, int]]] = [{} for _ in buffer.buckets]
            for (weight, (start, end, place)), number in zip(buffer.param_index_map.items(), numbers, strict=False):
                offset = buffer.buckets[place].offset
                weights[place][number], places[place][number] = weight, (start - offset, end - offset)
            for of_bucket, where, bucket in zip(weights, places, buffer.buckets, strict=True):
                shard_size = bucket.grad_data.numel() // self.data_parallel_group.size()
                yield of_bucket, Bucket(parts_of_bucket(where, shard_size), self.data_parallel_group,
                                        bucket.grad_data.device)

    def sharded_param_state_fully_reshardable(self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False,
                                              metadata: dict[str, Any] | None = None) -> dict[int, Any]:
        """Return whole masters and state tensors of the weights that this rank saves; each weight is saved by exactly
        one rank."""
        tensors, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        places = {place.data: place for place in nested_values(tensors)}
        found: dict[int, Any] = {}
        for weights, bucket in self._buckets():
            held = {} if is_loading else {part.weight: self._get_main_param_and_optimizer_states(weights[part.weight])
                                          for part in bucket.held}
            for name in PARTS:
                whole = ({part.weight: torch.empty(weights[part.weight].numel()) for part in bucket.owned} if is_loading
                         else bucket.gather({number: state[name] for number, state in held.items()}))
                for number, tensor in whole.items():
                    place = places[weights[number]]
                    # An asynchronous writer copies GPU tensors at once, but may share memory with CPU tensors.
                    if not is_loading and tensor.device.type == "cpu":
                        tensor = tensor.clone()
                    of_weight = make_sharded_optimizer_tensor(place, tensor.view(place.data.shape), state_prefix(name))
                    found.setdefault(number, {})[name] = replace(of_weight, replica_id=(*place.replica_id[:-1], 0))
        return found

    @torch.no_grad()
    def load_parameter_state_from_fully_reshardable(self, state_dict: dict[int, Any]) -> None:
        for weights, bucket in self._buckets():
            held: dict[int, dict[str, torch.Tensor]] = {part.weight: {} for part in bucket.held}
            for name in PARTS:
                whole = {part.weight: state_dict[part.weight][name].flatten() for part in bucket.owned}
                for number, tensor in bucket.scatter(whole).items():
                    held[number][name] = tensor
            for number, state in held.items():
                self._set_main_param_and_optimizer_states(weights[number], state)


class NamedState:
    """Mixin that saves state and fp32 masters as `optimizer.state.PART.NAME`, from which any other layout can resume.

    Stock code uses other keys for the masters, and the two stock classes use different places in the state dict.
    """

    optimizer: AdamATan2

    def weights(self) -> list[torch.nn.Parameter]:
        """Return the model's weights in the order of the masters."""
        raise NotImplementedError

    def parts(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return this rank's shards of a master and of its state."""
        state = {"param": master, **self.optimizer.init_state(master)}
        return {name: to_local_if_dtensor(tensor) for name, tensor in state.items()}

    def masters(self) -> list[torch.Tensor]:
        return [master for group in self.optimizer.param_groups for master in group["params"]]

    def sharded_state_dict(self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False,
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        places = get_param_id_to_sharded_param_map(model_sharded_state_dict, self.weights())
        state = {number: {name: make_sharded_optimizer_tensor(places[number], tensor, state_prefix(name))
                          for name, tensor in self.parts(master).items()}
                 for number, master in enumerate(self.masters())}
        return {"optimizer": {"param_groups": settings_of_groups(self.optimizer)}, "param_state": state,
                "param_state_sharding_type": BY_NAME["distrib_optim_sharding_type"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_updates(self.optimizer, state_dict["optimizer"]["param_groups"])
        for number, master in enumerate(self.masters()):
            for name, tensor in self.parts(master).items():
                tensor.copy_(state_dict["param_state"][number][name])


class NamedFP32Optimizer(NamedState, FP32Optimizer):  # type: ignore[misc]
    def weights(self) -> list[torch.nn.Parameter]:
        return self.masters()  # type: ignore[return-value]


class NamedBF16Optimizer(NamedState, Float16OptimizerWithFloat16Params):  # type: ignore[misc]
    def weights(self) -> list[torch.nn.Parameter]:
        return [*chain(*self.float16_groups)]
