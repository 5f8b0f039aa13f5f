"""Show the presets: a table of all, or the flags of a default layout for the launch scripts.

    python -m hrm_megatron.planner.presets               # the table of docs/scaling.md
    python -m hrm_megatron.planner.presets XXXL 64       # flags of hrm_megatron.pretrain
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from hrm_megatron.config import PRESETS, ConfigError, DefaultLayout, Preset
from hrm_megatron.program import one_line

BY_HAND = "by hand"
GPU_COUNTS = (8, 64, 512)


def layout_flags(layout: DefaultLayout) -> list[str]:
    """Return the flags of hrm_megatron.pretrain for a default layout."""
    flags = ["--tensor-model-parallel-size", str(layout.tensor), "--pipeline-model-parallel-size",
             str(layout.pipeline), "--context-parallel-size", str(layout.context), "--micro-batch-size",
             str(layout.micro_batch_size)]
    flags += ["--sequence-parallel"] * (layout.tensor > 1)
    if layout.gated_act:
        flags += ["--recompute-granularity", "selective", "--recompute-modules", "gated_act"]
    return flags + (["--recompute-ticks", str(layout.recompute_ticks)] if layout.recompute_ticks else [])


def default_layout(name: str, gpus: int) -> DefaultLayout:
    """Return the default layout of a preset on `gpus` GPUs; raises ConfigError if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name}: choose one of {', '.join(PRESETS)}")
    layouts = PRESETS[name].layouts
    if gpus < 1:
        raise ConfigError(f"preset {name}: has a default layout for {', '.join(map(str, layouts))} GPUs, and there are "
                          "none; leave LAYOUT out")
    if gpus not in layouts:
        raise ConfigError(f"preset {name}: has no default layout for {gpus} GPUs, but for "
                          f"{', '.join(map(str, layouts))}; python tools/plan.py --hrm-preset {name} --gpus {gpus} "
                          "finds one")
    return layouts[gpus]


def describe_preset(name: str, preset: Preset, given: Mapping[str, object]) -> str:
    """Return lines with all values that a preset sets and their sources; values `given` on the command line (name >
    value) replace them."""
    architecture = preset.architecture()
    rows = [("layers per stack", "num_layers", preset.num_layers, preset.sizes),
            ("hidden size", "hidden_size", preset.hidden_size, preset.sizes),
            ("attention heads", "num_attention_heads", preset.num_attention_heads, preset.sizes),
            ("FFN size", "ffn_hidden_size", preset.ffn_hidden_size, "8/3 of the hidden size, up to a multiple of 256"),
            ("learning rate", "lr", preset.lr, preset.lr_from),
            ("tokens per step", "tokens_per_step", preset.tokens_per_step, preset.batch_from)]
    lines = [f"preset {name}: {architecture.num_parameters / 1e9:.2f} B parameters with a vocabulary of "
             f"{architecture.vocab_size}"]
    for what, dest, of_preset, its_source in rows:
        value, source = (given[dest], BY_HAND) if dest in given else (of_preset, its_source)
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value
        lines.append(f"  {what:18} {shown:>10}  {source}")
    for gpus in GPU_COUNTS:
        flags = " ".join(layout_flags(preset.layouts[gpus])) if gpus in preset.layouts else "none fits"
        lines.append(f"  {gpus:3} H100 of 80 GB: {flags}")
    return "\n".join(lines)


def table() -> str:
    """Return the table of docs/scaling.md."""
    head = ["preset", "parameters", "layers per stack", "hidden", "heads", "FFN", "lr", "tokens per step",
            *(f"{gpus} H100" for gpus in GPU_COUNTS)]
    lines = [head, ["---"] * len(head)]
    sources: dict[str, list[str]] = {}
    for name, preset in PRESETS.items():
        for what, source in (("sizes", preset.sizes), ("lr", preset.lr_from), ("tokens", preset.batch_from)):
            sources.setdefault(f"{what}: {source}", []).append(name)
        lines.append([name, f"{preset.architecture().num_parameters / 1e9:.2f} B", f"{preset.num_layers}",
                      f"{preset.hidden_size}", f"{preset.num_attention_heads}", f"{preset.ffn_hidden_size}",
                      f"{preset.lr:g}", f"{preset.tokens_per_step:,}",
                      *(_cell(preset.layouts.get(gpus)) for gpus in GPU_COUNTS)])
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([*text, "", *(f"- {source}: {', '.join(names)}" for source, names in sorted(sources.items()))])


def _cell(layout: DefaultLayout | None) -> str:
    if layout is None:
        return "none fits"
    kept = ["gated_act"] * layout.gated_act + [f"{layout.recompute_ticks} ticks"] * (layout.recompute_ticks > 0)
    return (f"TP {layout.tensor} PP {layout.pipeline} CP {layout.context}, {layout.micro_batch_size} rows"
            f"{', ' + ' and '.join(kept) if kept else ''}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?")
    parser.add_argument("gpus", nargs="?", type=int)
    args = parser.parse_args()
    if args.preset is not None and args.gpus is None:
        parser.error("give the number of GPUs behind the preset")

    def run() -> None:
        print(" ".join(layout_flags(default_layout(args.preset, args.gpus))) if args.preset else table())
    return one_line(run)


if __name__ == "__main__":
    sys.exit(main())
