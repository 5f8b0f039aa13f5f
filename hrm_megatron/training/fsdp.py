"""What an HRM needs to train with torch's FSDP2 or Megatron-FSDP."""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import TorchFullyShardedDataParallel
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.optimizer import optimizer
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.utils import to_local_if_dtensor
from megatron.training import checkpointing
from megatron.training import training as megatron_training
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from hrm_megatron.config import Architecture, ConfigError, refuse_beside
from hrm_megatron.optim.sharded import BY_NAME
from hrm_megatron.parallel.connections import CONNECTIONS
from hrm_megatron.parallel.patching import around

# Megatron flags that each implies, so that a user gives one flag only. Under Megatron-FSDP each tick would overwrite
# fused gradients (tensor_parallel/layers.py). FSDP2's shards are loaded in place; a parallel load would return other
# tensors.
SETTINGS: dict[str, dict[str, Any]] = {
    "use_torch_fsdp2": dict(use_distributed_optimizer=False, gradient_accumulation_fusion=False,
                            ckpt_fully_parallel_load=False),
    "use_megatron_fsdp": dict(ckpt_format="fsdp_dtensor", gradient_accumulation_fusion=False),
}


def choose_fsdp(args: argparse.Namespace, architecture: Architecture) -> None:
    """Set the flags that FSDP needs, and refuse those that it is incompatible with."""
    chosen = [name for name in SETTINGS if getattr(args, name)]
    if not chosen:
        return
    refuse_beside(f"--{chosen[0].replace('_', '-')}", {
        "--use-megatron-fsdp": len(chosen) > 1,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size > 1,
        "--fp16": args.fp16,
        "--check-weight-hash-across-dp-replicas-interval (no two ranks hold the same)":
            args.check_weight_hash_across_dp_replicas_interval,
        "--save-wgrads-interval (it would save none)": args.save_wgrads_interval,
        "--save-params-interval (it would save one rank's shards)":
            args.use_torch_fsdp2 and args.save_params_interval,
        "--fp8-param-gather": args.use_torch_fsdp2 and args.fp8_param_gather,
        "--ckpt-fully-parallel-load-exchange-algo, -process-group (ranks read their own shards)":
            args.use_torch_fsdp2 and (args.ckpt_fully_parallel_load_exchange_algo != "broadcast"
                                      or args.ckpt_fully_parallel_load_process_group != "dp"),
        **(_megatron_fsdp_refuses(args) if args.use_megatron_fsdp else {}),
    })
    if os.environ.get(CONNECTIONS) == "1":
        raise ConfigError(f"{CONNECTIONS}=1 is exported: FSDP's gathers would wait for the kernels before them; unset "
                          "it, or export a larger one")
    if args.use_torch_fsdp2:
        _check_rows(args, architecture)
    vars(args).update(SETTINGS[chosen[0]])


def _megatron_fsdp_refuses(args: argparse.Namespace) -> dict[str, bool]:
    weights_recomputed = args.recompute_granularity == "full" or (
        args.recompute_granularity == "selective" and {*(args.recompute_modules or ())} - {"core_attn"})
    return {
        "--data-parallel-sharding-strategy no_shard": args.data_parallel_sharding_strategy == "no_shard",
        # A layer's gradient of one tick would overwrite that of a later tick.
        "recomputation of whole layers or MLPs (core_attn alone is right)": bool(weights_recomputed),
        "--recompute-ticks": args.recompute_ticks > 0,
        "--reuse-grad-buf-for-mxfp8-param-ag": args.reuse_grad_buf_for_mxfp8_param_ag,
        # Its checkpoints are loaded into a wrapper that Megatron omits here (fsdp_dtensor_checkpoint.py).
        "--skip-train (what tools/convert_checkpoint.py makes of its checkpoint evaluates without it)": args.skip_train,
    }


def _check_rows(args: argparse.Namespace, architecture: Architecture) -> None:
    """Refuse a number of ranks for which Megatron cannot save FSDP2's weights (core/utils.py, transformer/mlp.py)."""
    tp = args.tensor_model_parallel_size
    ranks = args.world_size // tp
    qkv, _ = architecture.linear_shapes["linear_qkv"]
    for name, rows, unit in (("hidden size", architecture.hidden_size, 1),
                             ("rows of queries, keys, values and gates", qkv // tp, 1),
                             ("FFN columns", 2 * architecture.ffn_hidden_size // tp, 2),  # no shard across gate and up
                             ("padded vocabulary", architecture.padded_vocab_size // tp, 1)):
        if ranks > 1 and (rows % ranks or ranks % unit):
            possible = [n for n in range(1, min(rows, 64) + 1) if rows % n == 0 and (n == 1 or n % unit == 0)]
            raise ConfigError(f"--use-torch-fsdp2 cannot share the {name} ({rows}) among {ranks} ranks: choose one of "
                              f"{', '.join(map(str, possible))}")


def sharded_by_fsdp(args: argparse.Namespace) -> tuple[str, ...]:
    """Return what is sharded over the data parallel ranks besides the optimizer state."""
    by_strategy = {"optim_grads": ("gradients",), "optim_grads_params": ("gradients", "weights")}
    if args.use_megatron_fsdp:
        return by_strategy.get(args.data_parallel_sharding_strategy, ())
    return by_strategy["optim_grads_params"] if args.use_torch_fsdp2 else ()


class TorchFSDP2(TorchFullyShardedDataParallel):  # type: ignore[misc]
    """Megatron's FSDP2 wrapper with gradients as in DDP: summed over the ranks, divided by the tokens of the step.

    The stock wrapper averages over the ranks, and its `scale_gradients` does nothing: wrong for a per-token loss.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # else by an op that only NCCL has
                _forget_backward(module)

    @torch.no_grad()
    def scale_gradients(self, scaling_factor: torch.Tensor) -> None:
        """Multiply all gradients by `scaling_factor` [1]."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                to_local_if_dtensor(parameter.grad).mul_(scaling_factor)


def count_all_zeros(stock: Callable[..., float], weights: Sequence[torch.Tensor], *rest: Any, **options: Any) -> float:
    """Count missing gradients as zeros, as in every other layout."""
    missing = [weight for weight in weights if weight.grad is None]
    for weight in missing:
        weight.grad = torch.zeros_like(weight)
    found = stock(weights, *rest, **options)
    for weight in missing:
        weight.grad = None
    return found


def _forget_backward(module: FSDPModule) -> None:
    """Allow a layer to be recomputed in the backward passes of several ticks.

    torch takes the second recomputation for a part of the first: its gradients would remain for the next micro-batch or
    the next step (torch/distributed/fsdp/_fully_shard/_fsdp_state.py, _pre_forward).
    """
    state = module._get_fsdp_state()
    if (group := state._fsdp_param_group) is not None:
        stock = group.post_backward

        def post_backward(*unused: Any) -> None:
            stock(*unused)
            state._training_state = TrainingState.IDLE
        group.post_backward = post_backward  # type: ignore[method-assign]


class FP32Module(Float16Module):  # type: ignore[misc]
    """The wrapper around a model that Megatron-FSDP's checkpoints expect; stock code has it only in half precision."""

    def __init__(self, module: MegatronModule) -> None:
        MegatronModule.__init__(self, module.config)
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        """Run the model."""
        return self.module(**inputs)


def install_fsdp(args: argparse.Namespace) -> None:
    """Install the classes above in Megatron's loop; under FSDP2, save and load as every other layout does."""
    if args.use_megatron_fsdp:
        # The stock function needs einops for one reshape.
        mcore_fsdp_adapter._get_dp_tp_mesh = lambda dp_cp_group, tp_group: torch.arange(
            torch.distributed.get_world_size()).view(dp_cp_group.size(), tp_group.size())
    if not args.use_torch_fsdp2:
        return
    stock_metadata, stock_load = checkpointing._build_sharded_state_dict_metadata, megatron_training.load_checkpoint

    def load_checkpoint(*arguments: Any, skip_load_to_model_and_opt: bool = False, **options: Any) -> Any:
        # Stock code also skips the optimizer's param groups, which hold the update counts.
        return stock_load(*arguments, **options)

    checkpointing._build_sharded_state_dict_metadata = lambda *arguments, **options: {
        **stock_metadata(*arguments, **options), **BY_NAME}
    megatron_training.load_checkpoint = load_checkpoint
    megatron_training.torch_FSDP = TorchFSDP2
    optimizer.count_zeros_fp32 = around(optimizer.count_zeros_fp32, count_all_zeros)
