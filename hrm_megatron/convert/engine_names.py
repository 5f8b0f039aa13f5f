"""Tensor names accepted by the programs that load an export, and what they do with others, as data with versions.

{i} numbers the layers; the stacks are H and L. A tensor whose name a program does not know is lost, in some silently.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hrm_megatron.config import ConfigError

OUTSIDE_LAYERS = ("model.z_L_init", "model.embed_tokens.weight", "lm_head.weight")
FUSED = ("attn.gqkv_proj.weight", "attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight")
IN_MODULES = ("self_attn.gate_proj.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight",
              "self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
              "mlp.down_proj.weight")


@dataclass(frozen=True)
class Engine:
    """A program that loads safetensors: its version, the source file of its names, the sets of names per layer that it
    accepts (one of them must be complete), and what it does with unknown names."""

    name: str
    version: str
    source: str
    layer: tuple[tuple[str, ...], ...]
    unknown: str


ENGINES = (
    Engine("transformers", "5.24.0", "src/transformers/conversion_mapping.py (hrm_text), models/hrm_text",
           (FUSED, IN_MODULES), "warns of it and leaves random weights in its place"),
    # Its loader renames ".attn." to ".self_attn." and splits the fused rows.
    Engine("vLLM", "commit 055e47c28003156421365af985d676fc921cb075", "vllm/model_executor/models/hrm_text.py",
           (FUSED, tuple(name.replace("attn.", "self_attn.") for name in FUSED)), "refuses to load"),
    Engine("SGLang", "commit 49b0705d3c194f5458904a75465ad160a0f221ca", "python/sglang/srt/models/hrm_text.py",
           (FUSED, tuple(name.replace("attn.", "self_attn.") for name in FUSED)), "skips it silently"),
    Engine("llama.cpp's converter", "commit 88b11da7588ddd43d10b8efad2e2931df69011ab", "conversion/hrm_text.py",
           (FUSED,), "refuses to convert"),
)


def complaints(names: Iterable[str], num_layers: int) -> list[str]:
    """List the tensors that the programs would miss or not accept, for a model with `num_layers` per stack."""
    found, said = set(names), []
    for engine in ENGINES:
        wanted = min((_names(layer, num_layers) for layer in engine.layer), key=lambda names: len(names ^ found))
        said += [f"{engine.name} ({engine.version}) needs {name}" for name in sorted(wanted - found)]
        said += [f"{engine.name} ({engine.version}) does not know {name}: it {engine.unknown}"
                 for name in sorted(found - wanted)]
    return said


def weight_of(name: str) -> str:
    """Return the weight that a tensor of an export belongs to: a quantized weight is several tensors."""
    place, _, last = name.rpartition(".")
    return f"{place}.weight" if last.startswith("weight_") else name


def check_names(place: object, names: Iterable[str], num_layers: int) -> None:
    """Refuse an export in which one of the programs would lose a tensor."""
    if said := complaints({weight_of(name) for name in names}, num_layers):
        more = f"; and {len(said) - 1} more" if len(said) > 1 else ""
        raise ConfigError(f"{place}: {said[0]}{more}; export it from a checkpoint with --save-format hf")


def _names(layer: Iterable[str], num_layers: int) -> set[str]:
    return {*OUTSIDE_LAYERS, *(f"model.{stack}_module.layers.{i}.{name}" for stack in "HL" for i in range(num_layers)
                               for name in layer)}
