"""Find the layouts that fit a cluster, fastest first, and the reason why each other one was rejected."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.optim.schedule import BPSchedule
from hrm_megatron.planner.flops import steps_by_bp
from hrm_megatron.planner.layout import Layout, PipelinePlan, check, check_fp8, plan_pipeline
from hrm_megatron.planner.machines import GPUS, Cluster
from hrm_megatron.planner.memory import BF16, Memory, Saving, fullest
from hrm_megatron.planner.speed import EXAMPLE, Step, predict_step

FILLED = 0.95  # of a GPU's memory: fragmentation is not predicted
TIMED = 8  # layouts for which the whole run is predicted: those with the fastest longest step
MOST_ROWS, MOST_CONTEXT = 16, 16  # largest micro-batch and context parallel size tried
STATES = ("weights", "gradients", "masters", "moments", "EMA")
FP8_MULTIPLE, FP8_RECIPE = 16, "tensorwise"  # training/hardware.py


@dataclass(frozen=True)
class Question:
    """The planner's input: a model, a cluster, and a run over `tokens`."""

    architecture: Architecture
    cluster: Cluster
    tokens: float
    rows: int
    row_tokens: int = 4096
    bp: tuple[int, int, float] = (2, 5, 0.2)  # --bp-min-steps, --bp-max-steps, --bp-warmup-fraction
    precisions: tuple[str, ...] = ("bf16",)
    example: tuple[int, int] = EXAMPLE

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.tokens / (self.rows * self.row_tokens)))

    def steps_by_bp(self) -> dict[int, int]:
        """Return {bp_steps: number of steps}."""
        return steps_by_bp(BPSchedule(*self.bp, self.steps))


@dataclass(frozen=True)
class Plan:
    """A layout that fits: `memory` of its fullest GPU, `step` its longest step, `seconds` of the whole run."""

    layout: Layout
    layers: list[int]
    saving: Saving
    precision: str
    memory: Memory
    step: Step
    pipeline: PipelinePlan | None
    seconds: float = 0.0
    by_bp: dict[int, Step] = field(default_factory=dict)

    @property
    def days(self) -> float:
        return self.seconds / 86400

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.layout.ranks / 3600

    @property
    def name(self) -> str:
        """The layout in a few words."""
        one = self.layout
        return (f"TP {one.tensor} x PP {one.pipeline} x CP {one.context} x DP {one.replicas}, micro-batch "
                f"{one.micro_batch_size}, {recomputed(self.saving)}{', FP8' if self.precision == 'fp8' else ''}")


def recomputed(saving: Saving) -> str:
    """Return a description of what is recomputed."""
    kinds = ["gated_act"] * saving.gated_act + [f"{saving.recompute_ticks} ticks"] * (saving.recompute_ticks > 0)
    return f"{' and '.join(kinds)} recomputed" if kinds else "nothing recomputed"


@dataclass(frozen=True)
class Rejected:
    """A rejected layout and the reason; `too_large`: the sizes divide, but memory does not suffice."""

    layout: Layout
    reason: str
    too_large: bool = False


def layouts(question: Question) -> Iterator[Layout]:
    """Yield every layout of the model and its rows, with each micro-batch size.

    Tensor parallel ranks stay within a node. If replicas do not divide the rows, micro-batch size 1 is yielded, which
    is then rejected.
    """
    cluster = question.cluster
    for tp in _divisors(cluster.gpus_per_node):
        for pp in _divisors(cluster.gpus // tp):
            for cp in (n for n in _divisors(cluster.gpus // tp // pp) if n <= MOST_CONTEXT):
                layout = Layout(cluster.gpus, tp, pp, cp, tp > 1, question.row_tokens, 1, question.rows)
                of_a_replica = question.rows // layout.replicas if question.rows % layout.replicas == 0 else 1
                for size in _divisors(max(1, of_a_replica)):
                    if size <= MOST_ROWS:
                        yield replace(layout, micro_batch_size=size)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def search(question: Question) -> tuple[list[Plan], list[Rejected]]:
    """Return the plans that fit, sorted by the time of the run, and all rejected layouts with reasons.

    A schedule is simulated only if the step could be among the fastest, judged by a lower bound: its time without
    bubble and recompute.
    """
    possible: list[tuple[float, Layout, str]] = []
    plans: list[Plan] = []
    rejected: list[Rejected] = []
    for layout in layouts(question):
        for precision in question.precisions:
            try:
                possible.append((_least_seconds(question, layout, precision), layout, precision))
            except ConfigError as error:
                rejected.append(Rejected(layout, str(error)))
    for least, layout, precision in sorted(possible, key=lambda one: one[0]):
        if len(plans) >= TIMED and least >= plans[TIMED - 1].step.seconds:
            rejected.append(Rejected(layout, "is slower than those above, even without a bubble and recomputation"))
        elif isinstance(found := settle(question, layout, precision), Plan):
            plans = sorted([*plans, found], key=lambda plan: (plan.step.seconds, plan.memory.total))
        else:
            rejected.append(Rejected(layout, found, too_large=True))
    counts = question.steps_by_bp()
    timed = [_whole_run(question, plan, counts) for plan in plans[:TIMED]]
    return sorted(timed, key=lambda plan: (plan.seconds, plan.memory.total)), rejected


def _least_seconds(question: Question, layout: Layout, precision: str) -> float:
    """Return a lower bound of a step's time; raises ConfigError for an invalid layout, as the command line does."""
    layers = check(question.architecture, layout, question.bp[1])
    cluster = question.cluster
    if precision == "fp8":
        if not GPUS[cluster.gpu].fp8:
            raise ConfigError(f"--precision fp8: {cluster.gpu} has no FP8; leave it out")
        check_fp8(question.architecture.hidden_size, question.architecture.ffn_hidden_size, layout, FP8_MULTIPLE,
                  FP8_RECIPE)
        cluster = cluster.with_fp8()
    saving = next(savings(question, precision))
    return predict_step(question.architecture, layout, layers, saving, cluster, None, question.example).seconds


def savings(question: Question, precision: str) -> Iterator[Saving]:
    """Yield the recompute choices, from none to most. FP8 layers keep their own copies of inputs, so gated_act would
    save nothing there."""
    labels = (question.example[1] + 1) / sum(question.example)
    most = question.bp[1]
    yield Saving(most, itemsize=BF16, labels=labels)
    for ticks in range(most + 1):
        if ticks or precision != "fp8":
            yield Saving(most, ticks, precision != "fp8", BF16, labels)


def settle(question: Question, layout: Layout, precision: str = "bf16") -> Plan | str:
    """Plan a run in a valid layout with as little recompute as fits; or return why it does not fit."""
    architecture = question.architecture
    cluster = question.cluster.with_fp8() if precision == "fp8" else question.cluster
    layers = check(architecture, layout, question.bp[1])
    if (least := fullest(architecture, layout, layers, Saving(labels=0.0)).parts) and (
            states := sum(least[name] for name in STATES)) > FILLED * cluster.memory_bytes:
        return _too_large(cluster, states, "weights, gradients and the optimizer's state alone")
    memory = None
    for saving in savings(question, precision):
        memory, pipeline = _memory(question, layout, layers, saving, precision)
        if memory.total <= FILLED * cluster.memory_bytes:
            step = predict_step(architecture, layout, layers, saving, cluster, pipeline, question.example)
            return Plan(layout, layers, saving, precision, memory, step, pipeline)
    assert memory is not None
    return _too_large(cluster, memory.total, "with all that can be recomputed")


def _too_large(cluster: Cluster, needed: float, what: str) -> str:
    return f"needs {needed / 1e9:.0f} GB of {FILLED * cluster.memory_bytes / 1e9:.0f} that may be filled, {what}"


def _memory(question: Question, layout: Layout, layers: list[int], saving: Saving,
            precision: str) -> tuple[Memory, PipelinePlan | None]:
    """Return the largest memory over the run's smallest and largest bp_steps, and the schedule at the largest."""
    found = []
    for bp_steps in sorted({question.bp[0], question.bp[1]}):
        one = replace(saving, bp_steps=bp_steps, recompute_ticks=min(saving.recompute_ticks, bp_steps),
                      fp8_copies=precision == "fp8")
        plan = _pipeline(question, layout, bp_steps)
        found.append(fullest(question.architecture, layout, layers, one, plan))
    return max(found, key=lambda memory: memory.total), plan


def _pipeline(question: Question, layout: Layout, bp_steps: int) -> PipelinePlan | None:
    if layout.pipeline == 1:
        return None
    a = question.architecture
    return plan_pipeline(a, bp_steps, layout.microbatches, layout.pipeline)


def _whole_run(question: Question, plan: Plan, counts: dict[int, int]) -> Plan:
    """Return the plan with the time of all steps, including the bp_steps warm-up."""
    cluster = question.cluster.with_fp8() if plan.precision == "fp8" else question.cluster
    by_bp = {}
    for bp_steps in counts:
        saving = replace(plan.saving, bp_steps=bp_steps, recompute_ticks=min(plan.saving.recompute_ticks, bp_steps))
        by_bp[bp_steps] = predict_step(question.architecture, plan.layout, plan.layers, saving, cluster,
                                       _pipeline(question, plan.layout, bp_steps), question.example)
    return replace(plan, by_bp=by_bp, seconds=sum(counts[bp] * step.seconds for bp, step in by_bp.items()))
