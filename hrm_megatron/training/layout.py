"""Say at the start what a run is laid out as: who holds what, and how long its pipeline waits."""
from __future__ import annotations

import argparse

import torch

from hrm_megatron.attention.core import explain_kernel
from hrm_megatron.config import Architecture
from hrm_megatron.model.schedule import states_between, unroll
from hrm_megatron.optim.adam_atan2 import STATE_KEYS
from hrm_megatron.parallel.main_grad import find_apex
from hrm_megatron.parallel.simulate import second_phase, stock, two_phase
from hrm_megatron.parallel.stages import microbatch_windows
from hrm_megatron.training.arguments import microbatches_of
from hrm_megatron.training.fsdp import sharded_by_fsdp
from hrm_megatron.training.hardware import TRANSFORMER_ENGINE
from hrm_megatron.transformer_config import architecture_of


def stage_parameters(architecture: Architecture, layers: list[int]) -> list[int]:
    """Count the weights of each pipeline stage, over all its tensor parallel ranks."""
    table = architecture.padded_vocab_size * architecture.hidden_size  # embedding on the first, head on the last
    counts = [2 * architecture.layer_parameters * n for n in layers]
    counts[0] += table
    counts[-1] += table
    return counts


def layers_of_stages(args: argparse.Namespace) -> list[int]:
    """Layers per stack on each stage, as Megatron cuts them."""
    stages, total = args.pipeline_model_parallel_size, args.num_layers
    ends = [args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers]
    if stages == 1:
        return [total]
    given = [end for end in ends if end is not None]
    between = (total - sum(given)) // max(1, stages - len(given))
    first, last = (between if end is None else end for end in ends)
    return [first, *[between] * (stages - 2), last]


def describe(args: argparse.Namespace) -> str:
    """Describe the layout of a run in a few lines."""
    tp, pp, cp, dp = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size,
                      args.data_parallel_size)
    microbatches = microbatches_of(args)
    lines = [f"layout: {args.world_size} ranks = TP {tp} x PP {pp} x CP {cp} x DP {dp}"
             f"{', sequence parallel' if args.sequence_parallel else ''}; a step is {microbatches} micro-batches of "
             f"{args.micro_batch_size} x {args.seq_length} tokens on each replica"]
    architecture = architecture_of(args, args.vocab_size)
    layers = layers_of_stages(args)
    shards, sharded, itemsize = dp * cp, sharded_by_fsdp(args), args.params_dtype.itemsize
    weight_bytes = itemsize / (shards if "weights" in sharded else 1)
    gradient_bytes = (itemsize if args.use_torch_fsdp2 else 4) / (shards if "gradients" in sharded else 1)
    # fp32 moments and EMA, and fp32 masters where the weights themselves are narrower.
    state_bytes = 4 * (len(STATE_KEYS) + (args.params_dtype != torch.float32)) / shards
    for stage, (n, count) in enumerate(zip(layers, stage_parameters(architecture, layers), strict=True)):
        rank = count / tp
        lines.append(f"  stage {stage}: {n} layers of each stack, {rank / 1e6:.2f} M parameters a rank; weights "
                     f"{rank * weight_bytes / 2**30:.3f}, gradients {rank * gradient_bytes / 2**30:.3f}, "
                     f"optimizer {rank * state_bytes / 2**30:.3f} GiB")
    if pp > 1:
        lines += [describe_pipeline(args, bp) for bp in sorted({args.bp_min_steps, args.bp_max_steps})]
    lines.append(f"weight gradients: {explain_weight_gradients(args)}")
    lines.append(f"attention: {explain_kernel(args.attention_kernel, args.params_dtype, architecture.head_dim)}")
    return "\n".join(lines)


def explain_weight_gradients(args: argparse.Namespace) -> str:
    """Say in one line who adds the gradients of weights."""
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
    """Describe the schedule of a step with so many gradient ticks in one line."""
    stages, window, microbatches = args.pipeline_model_parallel_size, args.pipeline_window, microbatches_of(args)
    ticks = unroll(args.h_cycles, args.l_cycles, bp_steps)
    with_grad = [tick.with_grad for tick in ticks]
    if first := second_phase(args.pipeline_schedule, with_grad, microbatches, stages, window):
        windows = microbatch_windows(microbatches, stages, window)
        found, rows = two_phase(microbatches, with_grad, stages, window), max(map(len, windows)) * args.micro_batch_size
        ranks = args.context_parallel_size * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
        kept = (states_between(ticks, first) * rows * args.seq_length * args.hidden_size * args.params_dtype.itemsize
                / ranks)
        how = (f"two phases{f' for each of {len(windows)} windows' if len(windows) > 1 else ''}; the first stage keeps "
               f"{kept / 2**30:.3f} GiB of states")
    else:
        found, how = stock(microbatches, with_grad, stages), "one phase"
    return (f"  pipeline at bp {bp_steps}: {how}; simulated bubble {found.bubble:.1%}, {found.live_graphs} ticks alive "
            "on a stage")
