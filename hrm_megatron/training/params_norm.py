"""`--log-params-norm`: the norm of all weights after the step, in every layout."""
from __future__ import annotations

import argparse
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.utils import to_local_if_dtensor
from megatron.training import training as megatron_training

from hrm_megatron.parallel.patching import around


def install_params_norm(args: argparse.Namespace) -> None:
    """Correct Megatron's norm where it is wrong (training/utils/common_utils.py, calc_params_l2_norm).

    It takes FSDP2's shards for whole weights. Without bf16, where it would read masters, it reads weights that an
    overlapped all-gather has not gathered yet.
    """
    if not args.log_params_norm:
        return
    if args.use_torch_fsdp2:
        megatron_training.calc_params_l2_norm = of_all_shards
    elif args.overlap_param_gather and not (args.bf16 or args.use_megatron_fsdp):
        megatron_training.calc_params_l2_norm = around(megatron_training.calc_params_l2_norm, _of_gathered_weights)


def of_all_shards(model: list[torch.nn.Module]) -> float:
    """Return the norm of weights sharded by FSDP2, of their masters if they have any."""
    tp_group = parallel_state.get_tensor_model_parallel_group()
    squared = torch.zeros(1, device=f"cuda:{torch.cuda.current_device()}")
    for chunk in model:
        for weight in chunk.parameters():
            if param_is_not_tensor_parallel_duplicate(weight, tp_group=tp_group):
                squared += to_local_if_dtensor(getattr(weight, "main_param", weight)).detach().float().norm() ** 2
    for group in (parallel_state.get_data_parallel_group(with_context_parallel=True),
                  parallel_state.get_model_parallel_group()):
        torch.distributed.all_reduce(squared, group=group)
    return float(squared.sqrt())


def _of_gathered_weights(stock: Any, model: list[torch.nn.Module]) -> float:
    megatron_training.force_param_sync(model)
    found: float = stock(model)
    return found
