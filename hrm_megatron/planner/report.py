"""Report the planner's result: the best layouts, why others were rejected, the command to start, and all of it as
data."""
from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from hrm_megatron.planner.machines import LINK_SHARE, Cluster
from hrm_megatron.planner.search import FILLED, Plan, Question, Rejected

SHOWN, KINDS = 5, 6  # plans, and kinds of reasons for rejection
WARMUP_STEPS, LEAST_WARMUPS = 2000, 25  # of the learning rate (README); a run is at least 25 times as long
NOTE = ("Times are predictions: {source}; links at {link:.0%} of the makers' figures; nothing overlaps but the "
        "messages of a pipeline.")


def table(question: Question, plans: Sequence[Plan], price: float | None) -> Iterator[str]:
    """Yield a table of the best plans, a line for each."""
    yield (f"{'':2} {'layout':72} {'GB':>5} {'s/step':>8} {'tokens/s/GPU':>12} {'MFU':>6} {'bubble':>6} {'days':>8} "
           f"{'GPU hours':>10}{'      cost' if price else ''}")
    for number, plan in enumerate(plans[:SHOWN], 1):
        cost = f" {plan.gpu_hours * price:9,.0f}" if price else ""
        yield (f"{number:2} {plan.name:72} {plan.memory.total / 1e9:5.1f} {plan.step.seconds:8.3f} "
               f"{plan.step.tokens_per_second:12,.0f} {plan.step.mfu(question.cluster.peak):6.1%} "
               f"{plan.step.bubble:6.1%} {plan.days:8.2f} {plan.gpu_hours:10,.0f}{cost}")


def head(name: str, question: Question) -> Iterator[str]:
    """Yield lines that describe the question."""
    cluster, architecture = question.cluster, question.architecture
    low, high, fraction = question.bp
    yield (f"{name}: {architecture.num_parameters / 1e9:.2f} B parameters on {cluster.gpus} x {cluster.gpu}, "
           f"{cluster.gpus_per_node} in a node, {cluster.memory_bytes / 1e9:.0f} GB each")
    yield (f"{question.tokens / 1e9:,.1f} B tokens in {question.steps:,} steps of {question.rows} rows of "
           f"{question.row_tokens}; bp {low} to {high} over {fraction:.0%} of the run")
    yield NOTE.format(source=cluster.speeds.source, link=LINK_SHARE)


def reasons(rejected: Sequence[Rejected], most: int | None = None) -> Iterator[str]:
    """Yield why the other layouts were rejected: an example of each kind of reason, the most frequent first."""
    yield f"{len(rejected)} other layouts:"
    kinds = Counter(_kind(one) for one in rejected)
    examples = {_kind(one): one for one in reversed(rejected)}
    for kind, count in kinds.most_common(most):
        one, layout = examples[kind], examples[kind].layout
        yield (f"  {count:4} such as TP {layout.tensor} x PP {layout.pipeline} x CP {layout.context}, micro-batch "
               f"{layout.micro_batch_size}: {one.reason}")


def _kind(one: Rejected) -> str:
    """Return the reason with its figures masked."""
    return re.sub(r"[\d.]+(, [\d.]+)*( or [\d.]+)?", "N", one.reason)


def explain(question: Question, plan: Plan) -> Iterator[str]:
    """Yield the memory and the time of a plan by part."""
    yield (f"memory of the fullest GPU (stage {plan.memory.stage}), {plan.memory.total / 1e9:.2f} GB of "
           f"{FILLED:.0%} x {question.cluster.memory_bytes / 1e9:.0f}:")
    for name, size in plan.memory.parts.items():
        if size:
            yield f"  {size / 1e9:8.3f} GB  {name}"
    ticks = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in plan.memory.ticks.items())
    yield f"  activations by tick: {ticks} GB"
    yield f"layers of each stack by stage: {' '.join(map(str, plan.layers))}"
    for bp_steps, step in sorted(plan.by_bp.items()):
        yield (f"a step at bp {bp_steps}: {step.seconds:.3f} s, {step.tokens_per_second:,.0f} tokens/s/GPU, MFU "
               f"{step.mfu(question.cluster.peak):.1%}, bubble {step.bubble:.1%}")
        yield "  " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in step.parts.items() if seconds)


def command(plan: Plan, question: Question, preset: str | None) -> str:
    """Return the command that starts a plan; the user fills in DATA, TOKENIZER and RUN."""
    layout, a = plan.layout, question.architecture
    flags = ["--data-path", "DATA", "--tokenizer-model", "TOKENIZER", "--save", "RUN", "--load", "RUN", "--bf16",
             "--seq-length", str(layout.row_tokens), "--micro-batch-size", str(layout.micro_batch_size),
             "--global-batch-size", str(layout.rows), "--train-iters", str(question.steps), "--lr-warmup-iters",
             str(min(WARMUP_STEPS, question.steps // LEAST_WARMUPS))]
    if preset is None:
        flags += ["--num-layers", str(a.num_layers), "--hidden-size", str(a.hidden_size), "--num-attention-heads",
                  str(a.num_attention_heads), "--ffn-hidden-size", str(a.ffn_hidden_size), "--lr", "RATE"]
    for flag, value, default in zip(("--bp-min-steps", "--bp-max-steps", "--bp-warmup-fraction"), question.bp,
                                    Question.bp, strict=True):
        if value != default:
            flags += [flag, str(value)]
    if plan.saving.gated_act:
        flags += ["--recompute-granularity", "selective", "--recompute-modules", "gated_act"]
    if plan.saving.recompute_ticks:
        flags += ["--recompute-ticks", str(plan.saving.recompute_ticks)]
    if plan.precision == "fp8":
        flags += ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
    nodes = -(-layout.ranks // question.cluster.gpus_per_node)
    sizes = f"PRESET={preset or 'B'} TP={layout.tensor} PP={layout.pipeline} CP={layout.context}"
    if nodes == 1:  # the node may have more GPUs
        sizes += f" DP={layout.replicas}"
    start = ("launch_scripts/train_node.sh" if nodes == 1 else
             f"sbatch --nodes {nodes} --gpus-per-node {question.cluster.gpus_per_node} --exclusive "
             "launch_scripts/train_slurm.sh")
    return f"{sizes} {start} {shlex.join(flags)}"


def as_data(name: str, question: Question, plans: Sequence[Plan], rejected: Sequence[Rejected],
            preset: str | None) -> dict[str, Any]:
    """Return all of it as a JSON-serializable dict."""
    return {
        "model": name, "parameters": question.architecture.num_parameters, "cluster": asdict(question.cluster),
        "tokens": question.tokens, "steps": question.steps, "rows": question.rows, "row_tokens": question.row_tokens,
        "times_are": "predictions", "plans": [_plan(plan, question.cluster, command(plan, question, preset))
                                              for plan in plans],
        "rejected": [{**_sizes(one), "reason": one.reason} for one in rejected]}


def _sizes(one: Plan | Rejected) -> dict[str, Any]:
    layout = one.layout
    return {"tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context, "data": layout.replicas,
            "micro_batch_size": layout.micro_batch_size}


def _plan(plan: Plan, cluster: Cluster, started: str) -> dict[str, Any]:
    return {**_sizes(plan), "precision": plan.precision, "recompute_ticks": plan.saving.recompute_ticks,
            "gated_act": plan.saving.gated_act, "layers": plan.layers, "memory_bytes": plan.memory.parts,
            "activation_bytes": plan.memory.ticks, "step_seconds": plan.step.seconds, "step_parts": plan.step.parts,
            "tokens_per_second_per_gpu": plan.step.tokens_per_second, "mfu": plan.step.mfu(cluster.peak),
            "bubble": plan.step.bubble, "days": plan.days, "gpu_hours": plan.gpu_hours, "command": started}
