"""Describe the parallel layout at start-up: memory per rank and pipeline bubble."""
from __future__ import annotations

import argparse

import torch

from hrm_megatron.attention.core import explain_kernel
from hrm_megatron.parallel.main_grad import find_apex
from hrm_megatron.planner.layout import GRADIENT_BYTES, counted, plan_pipeline, weight_bytes
from hrm_megatron.training.arguments import microbatches_of
from hrm_megatron.training.fsdp import sharded_by_fsdp
from hrm_megatron.training.hardware import TRANSFORMER_ENGINE
from hrm_megatron.training.lora import lora_of
from hrm_megatron.transformer_config import architecture_of


def layers_of_stages(args: argparse.Namespace) -> list[int]:
    """Return the layers per stack on each stage, as Megatron splits them."""
    stages, total = args.pipeline_model_parallel_size, args.num_layers
    ends = [args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers]
    if stages == 1:
        return [total]
    given = [end for end in ends if end is not None]
    between = (total - sum(given)) // max(1, stages - len(given))
    first, last = (between if end is None else end for end in ends)
    return [first, *[between] * (stages - 2), last]


def gradient_itemsize(args: argparse.Namespace) -> int:
    """Return the bytes per element of a reduced gradient."""
    reduced_in_fp32 = args.accumulate_allreduce_grads_in_fp32 and not args.use_torch_fsdp2
    return GRADIENT_BYTES if reduced_in_fp32 else int(args.params_dtype.itemsize)


def describe(args: argparse.Namespace) -> str:
    """Return a description of the layout in a few lines."""
    tp, pp, cp, dp = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size,
                      args.data_parallel_size)
    microbatches = microbatches_of(args)
    lines = [f"layout: {args.world_size} ranks = TP {tp} x PP {pp} x CP {cp} x DP {dp}"
             f"{', sequence parallel' if args.sequence_parallel else ''}; a step is {microbatches} micro-batches of "
             f"{args.micro_batch_size} x {args.seq_length} tokens on each replica"]
    architecture = architecture_of(args, args.vocab_size)
    layers = layers_of_stages(args)
    each = weight_bytes(args.params_dtype.itemsize, dp * cp, sharded_by_fsdp(args), gradient_itemsize(args))
    for stage, (n, counts) in enumerate(zip(layers, counted(architecture, layers, lora_of(args)), strict=True)):
        weights, trained = (count / tp for count in counts)
        lines.append(f"  stage {stage}: {n} layers of each stack, {weights / 1e6:.2f} M parameters a rank; weights "
                     f"{weights * each.weights / 2**30:.3f}, gradients {trained * each.gradients / 2**30:.3f}, "
                     f"optimizer {trained * each.optimizer / 2**30:.3f} GiB")
    if pp > 1:
        lines += [describe_pipeline(args, bp) for bp in sorted({args.bp_min_steps, args.bp_max_steps})]
    lines.append(f"weight gradients: {explain_weight_gradients(args)}")
    lines.append(f"attention: {explain_kernel(args.attention_kernel, args.params_dtype, architecture.head_dim)}")
    return "\n".join(lines)


def explain_weight_gradients(args: argparse.Namespace) -> str:
    """Return one line that says how weight gradients are accumulated."""
    if not args.gradient_accumulation_fusion:
        return f"summed over the ticks of a micro-batch by autograd, in {str(args.params_dtype).removeprefix('torch.')}"
    kernels, missing = find_apex()
    matmul = "Apex's fused kernel" if kernels else "torch's matmul"
    if missing and torch.cuda.is_available():
        matmul += f" (Apex's fused kernel: {missing})"
    if args.compile_layers:
        matmul = f"torch's matmul, compiled, in the head by {matmul}"
    elif args.transformer_impl == TRANSFORMER_ENGINE:
        matmul = f"Transformer Engine, in the head by {matmul}"
    return f"of every tick added to Megatron's buffer by {matmul}"


def describe_pipeline(args: argparse.Namespace, bp_steps: int) -> str:
    """Return one line about the pipeline schedule of a step with `bp_steps` gradient ticks."""
    plan = plan_pipeline(architecture_of(args, args.vocab_size), bp_steps, microbatches_of(args),
                         args.pipeline_model_parallel_size, args.pipeline_schedule, args.pipeline_window)
    how = "one phase"
    if plan.first:
        ranks = args.context_parallel_size * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
        kept = (plan.parked * args.micro_batch_size * args.seq_length * args.hidden_size * args.params_dtype.itemsize
                / ranks)
        how = (f"two phases{f' for each of {plan.windows} windows' if plan.windows > 1 else ''}; the first stage keeps "
               f"{kept / 2**30:.3f} GiB of states")
    return (f"  pipeline at bp {bp_steps}: {how}; simulated bubble {plan.estimate.bubble:.1%}, "
            f"{plan.estimate.live_graphs} ticks alive on a stage")
