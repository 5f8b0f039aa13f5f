"""`--log-params-norm`: the norm of all weights as they stand behind the step, in every layout."""
from __future__ import annotations

import argparse
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training import training as megatron_training

from hrm_megatron.parallel.patching import around


def install_params_norm(args: argparse.Namespace) -> None:
    """Mend Megatron's norm where it is another one (training/utils/common_utils.py, calc_params_l2_norm).

    It takes FSDP2's shards for whole weights, and without bf16, whose masters it reads, weights that an overlapped
    gather has yet to bring.
    """
    stock = megatron_training.calc_params_l2_norm
    if args.log_params_norm and args.use_torch_fsdp2:
        megatron_training.calc_params_l2_norm = around(stock, _of_all_shards)
    elif args.log_params_norm and args.overlap_param_gather and not args.bf16:
        megatron_training.calc_params_l2_norm = around(stock, _of_gathered_weights)


def _of_all_shards(stock: Any, model: list[torch.nn.Module]) -> float:
    squared = torch.tensor([stock(model) ** 2], dtype=torch.float32, device=torch.cuda.current_device())
    torch.distributed.all_reduce(squared, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return squared.sqrt().item()


def _of_gathered_weights(stock: Any, model: list[torch.nn.Module]) -> float:
    megatron_training.force_param_sync(model)
    found: float = stock(model)
    return found
