"""Speeds of a machine, fitted to training steps of small models measured on it by tools/benchmark.py."""
from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hrm_megatron.config import Architecture, ConfigError, ffn_hidden_size
from hrm_megatron.model.ticks import ticks_of
from hrm_megatron.planner.layout import Layout
from hrm_megatron.planner.machines import Cluster, Speeds
from hrm_megatron.planner.memory import Memory, Saving, memory_of_stages
from hrm_megatron.planner.speed import UPDATE_BYTES, Step, head_flops, predict_step, tick_work
from hrm_megatron.program import write_aside

VERSION = 1


@dataclass(frozen=True)
class Case:
    """A model and a step of it on one device: one micro-batch of `rows` rows filled with equal examples."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    row_tokens: int
    rows: int
    bp_steps: int
    vocab_size: int = 4096
    example: tuple[int, int] = (48, 80)

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.num_layers, self.hidden_size, self.num_attention_heads,
                            ffn_hidden_size(self.hidden_size), self.vocab_size)

    @property
    def layout(self) -> Layout:
        return Layout(1, row_tokens=self.row_tokens, micro_batch_size=self.rows)

    def saving(self, itemsize: int, on_cpu: bool) -> Saving:
        """Return what the step keeps. Each example has one label more than its response has positions."""
        labels = (self.example[1] + 1) / sum(self.example)
        return Saving(self.bp_steps, itemsize=itemsize, labels=labels, on_cpu=on_cpu)


@dataclass(frozen=True)
class Measured:
    """Seconds of a step of `case`, and the peak bytes of torch's allocator."""

    case: Case
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Calibration:
    """Speeds of `device`, and the measured steps: those `fitted`, and those `held_out` to test the fit."""

    device: str
    itemsize: int
    on_cpu: bool
    speeds: Speeds
    fitted: tuple[Measured, ...]
    held_out: tuple[Measured, ...]

    def write(self, file: Path) -> None:
        """Write to `file` atomically."""
        write_aside(file, json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")

    def step(self, case: Case) -> Step:
        """Predict the time of a step on this device."""
        cluster = Cluster(self.device, 1, 1, speeds=self.speeds)
        return predict_step(case.architecture, case.layout, [case.num_layers], case.saving(self.itemsize, self.on_cpu),
                            cluster, example=case.example)

    def memory(self, case: Case) -> Memory:
        """Predict the memory of a step on this device, only what torch allocates."""
        found = memory_of_stages(case.architecture, case.layout, [case.num_layers],
                                 case.saving(self.itemsize, self.on_cpu))[0]
        found.parts.pop("CUDA and NCCL (assumed)", None)
        return found


def read(file: Path) -> Calibration:
    """Read a file that `write` has written; raises ConfigError for any other."""
    try:
        found = json.loads(file.read_text())
        if found.pop("version") != VERSION:
            raise ValueError("another version")

        def steps(name: str) -> tuple[Measured, ...]:
            return tuple(Measured(Case(**one["case"] | {"example": tuple(one["case"]["example"])}), one["seconds"],
                                  one["peak_bytes"]) for one in found.pop(name))
        return Calibration(speeds=Speeds(**found.pop("speeds")), fitted=steps("fitted"), held_out=steps("held_out"),
                           **found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--calibrate {file}: is not what `python tools/benchmark.py calibrate --output FILE` writes "
                          f"({error}); make it again") from error


def work_of(case: Case, itemsize: int) -> list[float]:
    """Return the work of a step: FLOPs of matmuls, FLOPs of attention, bytes of element-wise operations, bytes of the
    update, number of layer calls."""
    architecture, layout = case.architecture, case.layout
    tick = tick_work(architecture, layout, case.num_layers, itemsize, case.example)
    ticks = ticks_of(architecture, case.bp_steps)
    passes = len(ticks) + 2 * case.bp_steps
    head = head_flops(architecture, layout, case.saving(itemsize, True).labels)
    return [passes * tick.matmul + head, passes * tick.attention, passes * tick.traffic,
            UPDATE_BYTES * float(architecture.num_parameters), (len(ticks) + case.bp_steps) * float(tick.layers)]


def fit(measured: Sequence[Measured], itemsize: int, hidden: bool, source: str) -> Speeds:
    """Fit the speeds to the measured seconds by least squares of relative errors, over every subset of kinds of work
    whose speeds are finite."""
    # Attention counts as matmul: its share of these steps is too small to be fitted separately.
    rows = []
    for one in measured:
        matmul, attention, traffic, update, layers = work_of(one.case, itemsize)
        rows.append([part / one.seconds for part in (matmul + attention, traffic, update, layers)])
    work = np.array(rows)
    best, least = np.zeros(work.shape[1]), np.inf
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(work.shape[1]), n)
                                                for n in range(1, work.shape[1] + 1)):
        part = work[:, chosen]
        scale = np.abs(part).max(0)
        found = np.linalg.lstsq(part / scale, np.ones(len(part)), rcond=None)[0] / scale
        error = float(((part @ found - 1) ** 2).sum())
        if (found > 0).all() and error < least:
            best, least = np.zeros(work.shape[1]), error
            best[list(chosen)] = found
    rates = [float(1 / cost) if cost else 1e30 for cost in best[:3]]  # 1e30: takes no time
    return Speeds(rates[0], rates[0], rates[1], rates[2], float(best[3]), hidden, source)
