"""Draw plans: memory by part and the schedule of a step. Needs matplotlib."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from hrm_megatron.config import Architecture
from hrm_megatron.model.ticks import ticks_of
from hrm_megatron.parallel.simulate import Estimate
from hrm_megatron.planner.search import FILLED, Plan, Question
from hrm_megatron.program import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORWARD, NO_GRADIENT, BACKWARD = "#4c78a8", "#b6cbe3", "#f58518"
LEGEND = "Light: a tick without gradient, dark: with, orange: backward. Figures: ticks of micro-batch 0"


def draw_schedule(axes: Axes, title: str, found: Estimate, with_grad: Sequence[bool]) -> None:
    """Draw one schedule: a line per stage, a bar per operation, labelled with its tick."""
    for stage, timeline in enumerate(found.timelines):
        for operation, start, end in timeline:
            if end == start:
                continue  # zeros that a tick without gradient returns
            color = BACKWARD if operation.backward else FORWARD if with_grad[operation.tick] else NO_GRADIENT
            axes.barh(stage, end - start, left=start, color=color, edgecolor="white", linewidth=0.3)
            if operation.microbatch == 0:
                axes.text((start + end) / 2, stage, str(operation.tick), ha="center", va="center", fontsize=5)
    axes.set_title(f"{title}: bubble {found.bubble:.1%}, {found.live_graphs} ticks alive on a stage", fontsize=9)
    stages = range(len(found.timelines))
    axes.set_yticks(stages, [f"stage {stage}" for stage in stages], fontsize=7)
    axes.invert_yaxis()


def draw_memory(axes: Axes, question: Question, plans: Sequence[Plan]) -> None:
    """Draw a stacked bar of memory by part for each plan, and a line at the limit."""
    names = [name for name in plans[0].memory.parts if any(plan.memory.parts.get(name) for plan in plans)]
    left = [0.0] * len(plans)
    for number, name in enumerate(names):
        sizes = [plan.memory.parts.get(name, 0.0) / 1e9 for plan in plans]
        axes.barh(range(len(plans)), sizes, left=left, label=name, color=plt.get_cmap("tab20")(number))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.axvline(FILLED * question.cluster.memory_bytes / 1e9, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(plans)), [plan.name for plan in plans], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GB on the fullest GPU, predicted; dashed: what may be filled", fontsize=8)
    axes.legend(fontsize=6, ncols=5, loc="upper center", bbox_to_anchor=(0.4, -0.22))


def draw_step(axes: Axes, plan: Plan, architecture: Architecture) -> None:
    """Draw the schedule of the longest step; without a pipeline, its time by part."""
    if plan.pipeline is None:
        left = 0.0
        for number, (name, seconds) in enumerate(plan.step.parts.items()):
            if seconds:
                axes.barh(0, seconds, left=left, label=name, color=plt.get_cmap("tab20")(number))
                left += seconds
        axes.set_yticks([0], ["a step"], fontsize=7)
        axes.set_xlabel("seconds, predicted", fontsize=8)
        axes.legend(fontsize=6, ncols=5, loc="upper right")
        return
    with_grad = [tick.with_grad for tick in ticks_of(architecture, plan.saving.bp_steps)]
    phases = "two phases" if plan.pipeline.first else "one phase"
    draw_schedule(axes, f"{plan.name}: {phases}", plan.pipeline.estimate, with_grad)
    axes.set_xlabel(f"time, in forwards of a tick on a stage; bp {plan.saving.bp_steps}, {plan.layout.microbatches} "
                    f"micro-batches. {LEGEND}", fontsize=8)


def draw(question: Question, plans: Sequence[Plan], title: str, output: Path) -> None:
    """Write a picture of the memory of all `plans` and a step of the first one."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(14, 7), layout="constrained")
    figure.suptitle(title, fontsize=10)
    draw_memory(above, question, plans)
    draw_step(below, plans[0], question.architecture)
    with whole_file(output) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)
