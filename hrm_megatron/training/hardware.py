"""Which layers and number formats a machine can run: rules over the command line and a few facts about it."""
from __future__ import annotations

import argparse

from hrm_megatron.config import ConfigError, refuse_beside
from hrm_megatron.parallel.machine import Machine
from hrm_megatron.planner.layout import Layout, check_fp8

LOCAL, TRANSFORMER_ENGINE = TRANSFORMER_IMPLS = "local", "transformer_engine"
BF16_CAPABILITY = (8, 0)
# FP8 recipe to (lowest compute capability, required multiple of sizes). Sources: Transformer Engine,
# pytorch/quantization.py, _compute_fp8_support and _compute_mxfp8_support; fp8_utils.py, get_fp8_align_size.
FP8_RECIPES = {"delayed": ((8, 9), 16), "tensorwise": ((8, 9), 16), "mxfp8": ((10, 0), 32)}
NO_MXFP8_FROM = (12, 0)


def choose_layers(asked: str | None, compiled: bool, machine: Machine) -> tuple[str, str]:
    """Return the transformer implementation to use, and the reason for the log; `asked` is the flag's value or None."""
    missing = machine.lacks_transformer_engine()
    if compiled:
        if asked == TRANSFORMER_ENGINE:
            raise ConfigError(f"--compile-layers: compiles Megatron's local layers, not --transformer-impl {asked}; "
                              "leave one of them out")
        return LOCAL, "Megatron's local ones, compiled"
    if asked == TRANSFORMER_ENGINE and missing:
        raise ConfigError(f"--transformer-impl {asked}: {missing}; --transformer-impl {LOCAL} works here")
    if asked == LOCAL:
        return LOCAL, "Megatron's local ones, as asked"
    if missing:
        return LOCAL, f"Megatron's local ones: {missing}"
    return TRANSFORMER_ENGINE, f"Transformer Engine {machine.transformer_engine}"


def check_compilation(args: argparse.Namespace, machine: Machine) -> None:
    """Refuse --compile-layers with flags that it is incompatible with."""
    if not args.compile_layers:
        return
    if machine.capability is None:
        raise ConfigError("--compile-layers: needs a CUDA device, and there is none; leave it out")
    refuse_beside("--compile-layers", {
        # Their collectives run in the backward of a linear layer, which torch.compile cannot trace.
        "--tensor-model-parallel-size": args.tensor_model_parallel_size > 1,
        "--use-torch-fsdp2": args.use_torch_fsdp2, "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--recompute-modules gated_act": args.recompute_gated_act,
        "--recompute-granularity (--recompute-ticks works)": args.recompute_granularity or args.recompute_activations,
    })


def check_precision(args: argparse.Namespace, machine: Machine) -> None:
    """Refuse number formats that the machine or the layers do not support; call it after `choose_layers`."""
    device = "this GPU (compute capability {}.{})".format(*machine.capability or (0, 0))
    if args.bf16 and machine.capability and machine.capability < BF16_CAPABILITY:
        raise ConfigError(f"--bf16: {device} has no bf16, which begins with 8.0; leave it out to train in fp32")
    if not args.fp8:
        return
    if args.transformer_impl != TRANSFORMER_ENGINE:
        if missing := machine.lacks_transformer_engine():
            raise ConfigError(f"--fp8-format {args.fp8}: {missing}; leave it out")
        if args.compile_layers:
            raise ConfigError(f"--fp8-format {args.fp8}: --compile-layers has no FP8; leave one of them out")
        raise ConfigError(f"--fp8-format {args.fp8}: --transformer-impl {args.transformer_impl} has no FP8; give "
                          f"--transformer-impl {TRANSFORMER_ENGINE}")
    if args.fp8_recipe not in FP8_RECIPES:
        raise ConfigError(f"--fp8-recipe {args.fp8_recipe}: choose one of {', '.join(FP8_RECIPES)}")
    assert machine.capability is not None  # Transformer Engine needs CUDA
    lowest, multiple = FP8_RECIPES[args.fp8_recipe]
    if machine.capability < FP8_RECIPES["tensorwise"][0]:
        raise ConfigError(f"--fp8-format {args.fp8}: {device} has no FP8, which begins with 8.9; leave it out")
    if machine.capability < lowest or (args.fp8_recipe == "mxfp8" and machine.capability >= NO_MXFP8_FROM):
        raise ConfigError(f"--fp8-recipe {args.fp8_recipe}: {device} cannot run it (10.0 to 11.x can); "
                          "--fp8-recipe tensorwise works here")
    if args.fp8_recipe == "delayed":
        _check_delayed(args)
    _check_fp8_sizes(args, multiple)


def _check_delayed(args: argparse.Namespace) -> None:
    if args.first_last_layers_bf16:
        raise ConfigError("--first-last-layers-bf16: Megatron cannot mix it with delayed scaling; give --fp8-recipe "
                          "tensorwise")
    if args.recompute_granularity == "full" or "mlp" in (args.recompute_modules or ()):
        # One FIFO queue per layer (FP8GlobalStateManager.get_old_fp8_meta_tensors_for_recompute).
        raise ConfigError("--recompute-granularity with --fp8-recipe delayed: Transformer Engine takes the scales of "
                          "recomputed layers back in the order of the ticks, gradients come in the reverse order; give "
                          "--fp8-recipe tensorwise, or recompute core_attn only")


def _check_fp8_sizes(args: argparse.Namespace, multiple: int) -> None:
    layout = Layout(args.tensor_model_parallel_size, args.tensor_model_parallel_size, 1, args.context_parallel_size,
                    args.sequence_parallel, args.seq_length, args.micro_batch_size)
    check_fp8(args.hidden_size, args.ffn_hidden_size, layout, multiple, args.fp8_recipe)
    most = args.num_layers // args.pipeline_model_parallel_size
    for end in ("start", "end") if args.first_last_layers_bf16 else ():
        if not 0 <= (layers := getattr(args, f"num_layers_at_{end}_in_bf16")) <= most:
            raise ConfigError(f"--num-layers-at-{end}-in-bf16 {layers}: counts layers of each stack; choose 0 to "
                              f"{most}, the layers of a pipeline stage")
