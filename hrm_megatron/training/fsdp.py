"""Weights sharded over the data parallel ranks, by torch's FSDP2 or by Megatron-FSDP: what the HRM needs of them."""
from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from megatron.core.distributed import TorchFullyShardedDataParallel
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.utils import to_local_if_dtensor
from megatron.training import checkpointing
from megatron.training import training as megatron_training
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from hrm_megatron.config import ConfigError
from hrm_megatron.optim.sharded import BY_NAME

# What each needs of Megatron's other flags, so that a user gives one flag only.
SETTINGS: dict[str, dict[str, Any]] = {
    "use_torch_fsdp2": dict(use_distributed_optimizer=False, gradient_accumulation_fusion=False),
    "use_megatron_fsdp": dict(ckpt_format="fsdp_dtensor", gradient_accumulation_fusion=False),
}


class TorchFSDP2(TorchFullyShardedDataParallel):  # type: ignore[misc]
    """Megatron's, whose gradients are sums over the ranks, divided by the tokens of the step as DDP's are.

    Stock FSDP2 averages over the ranks and its `scale_gradients` does nothing, which is wrong for a loss per token.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                _forget_backward(module)
                module.set_force_sum_reduction_for_comms(True)  # else by an operation that NCCL alone has

    @torch.no_grad()
    def scale_gradients(self, scaling_factor: torch.Tensor) -> None:
        """Multiply all gradients by `scaling_factor` [1]."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                to_local_if_dtensor(parameter.grad).mul_(scaling_factor)


class FP32Module(Float16Module):  # type: ignore[misc]
    """The level that Megatron-FSDP's checkpoints expect around a model, which only half precision has in stock code."""

    def __init__(self, module: MegatronModule) -> None:
        MegatronModule.__init__(self, module.config)
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def _forget_backward(module: FSDPModule) -> None:
    """Let a module that was used in the backward pass begin anew at each further use, by another tick.

    A layer that is recomputed runs forward inside the backward pass. torch takes the second such run for a part of the
    first one: its gradients would be added to those of the next micro-batch, or of the next step.
    """
    state = module._get_fsdp_state()
    if (group := state._fsdp_param_group) is not None:
        stock = group.post_backward

        def post_backward(*unused: Any) -> None:
            stock(*unused)
            state._training_state = TrainingState.IDLE
        group.post_backward = post_backward  # type: ignore[method-assign]


def choose_settings(args: argparse.Namespace) -> None:
    for flag, settings in SETTINGS.items():
        if getattr(args, flag):
            vars(args).update(settings)
            if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
                del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]


def install_fsdp(args: argparse.Namespace) -> None:
    """Let Megatron's loop shard weights by the class above and save and load as without."""
    if args.use_megatron_fsdp:
        from megatron.core.distributed.fsdp import mcore_fsdp_adapter
        mcore_fsdp_adapter._get_dp_tp_mesh = lambda dp_cp_group, tp_group, ep_size=1: torch.arange(
            dp_cp_group.size() * tp_group.size()).view(dp_cp_group.size(), tp_group.size())
    if not args.use_torch_fsdp2:
        return
    stock_metadata, stock_load = checkpointing._build_sharded_state_dict_metadata, megatron_training.load_checkpoint

    def load_checkpoint(*arguments: Any, skip_load_to_model_and_opt: bool = False, **options: Any) -> Any:
        # Stock code skips the optimizer's groups too, which hold the counts of updates.
        return stock_load(*arguments, **options)

    checkpointing._build_sharded_state_dict_metadata = lambda *arguments, **options: {
        **stock_metadata(*arguments, **options), **BY_NAME}
    megatron_training.load_checkpoint = load_checkpoint
    megatron_training.torch_FSDP = TorchFSDP2
