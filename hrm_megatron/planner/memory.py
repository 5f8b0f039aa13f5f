"""Memory of a training step on a GPU by sums over shapes: what is known before a run, without allocator and kernels."""
from __future__ import annotations

from hrm_megatron.config import Architecture

WEIGHT_BYTES, GRADIENT_BYTES = 2, 4  # bf16 weights, gradients reduced in fp32
OPTIMIZER_BYTES = 4 * 4  # fp32 master, both moments and EMA, sharded over the data parallel ranks
ACTIVATION_BYTES = 2  # bf16


def model_bytes(architecture: Architecture, data_parallel: int = 1) -> float:
    """Bytes of weights, gradients and optimizer state on each GPU of one model replica per GPU."""
    return architecture.num_parameters * (WEIGHT_BYTES + GRADIENT_BYTES + OPTIMIZER_BYTES / data_parallel)


def kept_tensors(architecture: Architecture, gated_act: bool = False) -> list[float]:
    """Sizes of the tensors that one layer keeps for its backward, in states [s, b, h].

    The results of both norms, queries, keys and values, the gate, attention's result before and after the gate, the
    sum behind attention; keys and values of prefixes, a quarter of the positions, once more; of the MLP both halves
    of its first product and SwiGLU. `gated_act`, if recomputed, leaves out SwiGLU and the gated result. tests/te
    counts them over stand-ins of the kernels.
    """
    ffn = architecture.ffn_hidden_size / architecture.hidden_size
    return [1.0] * 8 + [0.25] * 2 + [2 * ffn] + ([] if gated_act else [1.0, ffn])


def layer_states(architecture: Architecture, gated_act: bool = False) -> float:
    """Size of all that one layer keeps for its backward, in states [s, b, h]."""
    return sum(kept_tensors(architecture, gated_act))


def offloaded_bytes(architecture: Architecture, positions: int) -> tuple[int, int]:
    """Bytes that one layer and tick with gradient keep in the host's memory where they are offloaded, and bytes of
    pinned memory for them: torch's allocator rounds each tensor up to a power of two (CachingHostAllocator.h)."""
    state = positions * architecture.hidden_size * ACTIVATION_BYTES
    sizes = [round(states * state) for states in kept_tensors(architecture)]
    return sum(sizes), sum(1 << (size - 1).bit_length() for size in sizes)


def activation_bytes(architecture: Architecture, positions: int, bp_steps: int, gated_act: bool = False,
                     recompute_ticks: int = 0) -> float:
    """Bytes that the ticks with gradient of one micro-batch of `positions` keep at most.

    The first `recompute_ticks` of them keep their input and are rebuilt one at a time, when the later ticks' graphs
    are gone.
    """
    state = positions * architecture.hidden_size * ACTIVATION_BYTES
    tick = layer_states(architecture, gated_act) * architecture.num_layers * state
    built = max(bp_steps - recompute_ticks, 1)
    return built * tick + recompute_ticks * state
