"""Measure training as users run it: `hrm_megatron.pretrain` on one device, on random rows of a given shape."""
from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hrm_megatron.benchmark.kernels import Share, breakdown
from hrm_megatron.benchmark.rows import write_random_examples
from hrm_megatron.config import Architecture, ConfigError, Preset
from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.data.sampled import SampledFolder
from hrm_megatron.monitoring.scalars import Log
from hrm_megatron.planner.flops import rows_flops
from hrm_megatron.program import run_command

WARMUP_STEPS, PROFILED_STEPS = 5, 2
# Flags that must not be passed: FLOPs are counted for an HRM of the given shape, and data and log are this tool's.
COUNTED = {f"--{name}" for name in (
    "num-layers", "hidden-size", "num-attention-heads", "ffn-hidden-size", "seq-length", "global-batch-size",
    "train-iters", "train-samples", "epochs", "match-flops-of", "exit-interval", "exit-duration-in-mins", "load",
    "bp-min-steps", "bp-max-steps", "hrm-preset", "model-type", "h-cycles", "l-cycles", "attention-gate",
    "attention-mask", "loss-on-prefix", "lora-rank", "finetune", "sampled-data-path", "data-path", "tensorboard-dir",
    "profile-step-start", "profile-step-end")}


@dataclass(frozen=True)
class Measured:
    """`tokens_per_second` is the median over the measured steps; `flops` are per step; `peak_bytes` is that of the
    allocator, 0 on a CPU."""

    architecture: Architecture
    tokens_per_second: float
    step_seconds: float
    flops: float
    peak_bytes: int
    shares: list[Share]

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.step_seconds


def measure(preset: Preset, row_tokens: int, rows: int, steps: int, vocab_size: int, bp_steps: int, folder: Path,
            flags: Sequence[str] = ()) -> Measured:
    """Train `steps` steps of `rows` rows after a warm-up; `flags` are further flags of hrm_megatron.pretrain.

    Raises ConfigError for flags that would invalidate the FLOP count, and with the run's first error if it fails; its
    whole output is in `folder`/output.
    """
    if counted := sorted({flag.partition("=")[0] for flag in flags} & COUNTED):
        raise ConfigError(f"{counted[0]}: the FLOPs of this run are counted without it; choose sizes, rows and "
                          "gradient ticks by this tool's own flags, in front of --, and leave it out")
    data = folder / "data"
    if data.exists():
        raise ConfigError(f"{data} exists; give another --output, or remove it")
    total = WARMUP_STEPS + steps + PROFILED_STEPS
    write_random_examples(data, row_tokens, rows * (total + 1), vocab_size)
    sizes = dict(num_layers=preset.num_layers, hidden_size=preset.hidden_size,
                 num_attention_heads=preset.num_attention_heads, seq_length=row_tokens, global_batch_size=rows,
                 micro_batch_size=1, train_iters=total, bp_min_steps=bp_steps, bp_max_steps=bp_steps, lr=1e-4,
                 eval_iters=0, log_interval=1, sampled_data_path=data, tensorboard_dir=folder / "log",
                 profile_step_start=WARMUP_STEPS + steps, profile_step_end=total, profile_ranks=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m",
               "hrm_megatron.pretrain", "--profile", "--use-pytorch-profiler", "--log-memory-to-tensorboard"]
    for name, value in sizes.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    with (folder / "output").open("w") as output:
        code = run_command([*command, *flags], output)
    if code:
        output_text = (folder / "output").read_text(errors="replace")
        said = re.findall(r"^(?:\[rank0\]: )?((?:error|[\w.]+Error): .*)", output_text, re.MULTILINE)
        raise ConfigError(f"the run failed: {said[0] if said else f'exit code {code}'}; its output is in "
                          f"{folder / 'output'}")
    scalars = _scalars(folder / "log")
    measured = range(WARMUP_STEPS + 1, WARMUP_STEPS + steps + 1)
    speeds = scalars.get("tokens per second", {})
    if missing := [step for step in measured if step not in speeds]:
        raise ConfigError(f"the run logged no speed of step {missing[0]}; leave out what ends it before step {total} "
                          f"or logs less than every step; its output is in {folder / 'output'}")
    speed = statistics.median(speeds[step] for step in measured)
    architecture = Architecture(preset.num_layers, preset.hidden_size, preset.num_attention_heads,
                                preset.ffn_hidden_size, vocab_size)
    flops = _flops(architecture, bp_steps, data, row_tokens, rows, measured)
    return Measured(architecture, speed, rows * row_tokens / speed, flops,
                    int(max(scalars["mem-max-allocated-bytes"].values())),
                    breakdown(folder / "torch_profile" / "rank-0.json.gz"))


def _scalars(log: Path) -> dict[str, dict[int, float]]:
    return {name: dict(zip(curve.steps, curve.values, strict=True)) for name, curve in Log(log).curves().items()}


def _flops(architecture: Architecture, bp_steps: int, data: Path, row_tokens: int, rows: int, steps: range) -> float:
    """Return the mean FLOPs of these steps, from the examples in their rows."""
    dataset = PackedRows(SampledFolder(data), row_tokens, 0, rows * steps[-1])  # a sampled folder has a fixed order
    packed = [PackedBatch.from_row(dataset[i]).lengths[0] for i in range(rows * (steps[0] - 1), rows * steps[-1])]
    return rows_flops(architecture, bp_steps, row_tokens, packed) / len(steps)
