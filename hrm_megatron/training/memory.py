"""Checks of the flags that save memory: which of them work for this model."""
from __future__ import annotations

import argparse

from hrm_megatron.config import ConfigError, refuse_beside
from hrm_megatron.parallel.machine import Machine

# Our addition to --recompute-modules, the counterpart of Megatron's "moe_act": layers/gated_recompute.py.
GATED_ACT = "gated_act"
# Values of --recompute-modules. Megatron's "layernorm" would keep a norm's input instead of its output, which has the
# same size and is all that norm and linear layer need; the others belong to layers that an HRM does not have.
RECOMPUTED_MODULES = ("core_attn", "mlp", GATED_ACT)
LESS_MEMORY = ("Way out: --recompute-granularity selective --recompute-modules gated_act, or --fp8-format, then "
               "--recompute-ticks K, keep less of each position; a smaller --micro-batch-size or shorter rows "
               "(--seq-length) are fewer positions at a time")
OLDEST_OFFLOADING_TE = (2, 10)  # the first with the cpu_offload.py that layers/offload.py was tested with


def choose_recompute_modules(args: argparse.Namespace) -> None:
    """Check --recompute-modules, and move our own module, which Megatron would refuse, to args.recompute_gated_act."""
    given = args.recompute_modules or []
    for module in given:
        if module not in RECOMPUTED_MODULES:
            raise ConfigError(f"--recompute-modules {module}: saves nothing in this model; choose among "
                              f"{', '.join(RECOMPUTED_MODULES)}")
    if given and args.recompute_granularity != "selective" and not args.recompute_activations:
        raise ConfigError(f"--recompute-modules {' '.join(given)}: has no effect without --recompute-granularity "
                          "selective; add that, or leave the modules out")
    args.recompute_gated_act = GATED_ACT in given
    if args.recompute_gated_act:
        args.recompute_modules = [module for module in given if module != GATED_ACT] or None
    if args.recompute_gated_act and not args.recompute_modules:  # None means core_attn to Megatron
        args.recompute_granularity, args.recompute_activations = None, False


def check_memory(args: argparse.Namespace, machine: Machine) -> None:
    """Refuse memory flags that would compute wrong results or save nothing."""
    ticks, full = args.recompute_ticks, args.recompute_granularity == "full"
    if not 0 <= ticks <= args.bp_max_steps:
        raise ConfigError(f"--recompute-ticks {ticks} must lie between 0 and {args.bp_max_steps}, the most ticks with "
                          "gradient (--bp-max-steps)")
    if ticks and full:
        raise ConfigError(f"--recompute-ticks {ticks} with --recompute-granularity full would run layers three times: "
                          "choose one of them, or --recompute-granularity selective")
    if ticks and args.fp8 and args.fp8_recipe == "delayed":
        raise ConfigError(f"--recompute-ticks {ticks} with --fp8-recipe delayed: a recomputed tick would find "
                          "other scales; choose another recipe")
    if args.recompute_gated_act and args.fp8:
        raise ConfigError("--recompute-modules gated_act: saves nothing in FP8, whose layers keep their own copy of "
                          "what they multiply; leave it out")
    if args.cpu_offloading_num_layers:
        _check_offloading(args, machine)


def _check_offloading(args: argparse.Namespace, machine: Machine) -> None:
    layers, flag = args.cpu_offloading_num_layers, "--cpu-offloading-num-layers"
    if missing := machine.lacks_transformer_engine(OLDEST_OFFLOADING_TE):
        raise ConfigError(f"{flag} {layers}: {missing}; leave it out: --recompute-ticks saves activations anywhere")
    if not 0 < layers < args.num_layers:
        raise ConfigError(f"{flag} {layers}: counts layers of each stack and must leave one of the {args.num_layers}; "
                          f"choose 1 to {args.num_layers - 1}")
    refuse_beside(f"{flag} {layers}", {
        f"--transformer-impl {args.transformer_impl}": args.transformer_impl != "transformer_engine",
        # Megatron's rules (TransformerConfig.__post_init__).
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size > 1,
        "--recompute-granularity (--recompute-ticks works)": args.recompute_granularity or args.recompute_activations,
        "--recompute-modules gated_act": args.recompute_gated_act,
        # FSDP's gathered weights would be offloaded along with the activations.
        "--use-torch-fsdp2": args.use_torch_fsdp2, "--use-megatron-fsdp": args.use_megatron_fsdp,
    })
