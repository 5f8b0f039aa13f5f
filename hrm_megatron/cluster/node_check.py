"""Find bad nodes from the report that each node wrote about itself, by fixed rules."""
from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from hrm_megatron.cluster.failures import LOST_A_PEER
from hrm_megatron.program import write_aside

MOST_NAMED = 3  # nodes named when all are bad for one reason
GPU_COUNT = "GPUs"  # a cause that all nodes may share, as the name of a rate is
NOT_DONE = "the nodes were not done after"  # start of the error of a node that waited for others in vain


@dataclass
class Report:
    """Measurements of a node. Rates are those of its slowest GPU, or of its CPU; None: not measured, or not reached."""

    node: str
    gpus: int  # seen by torch
    expected_gpus: int
    faults: list[str] = field(default_factory=list)  # reported by nvidia-smi: ECC, row remapping, clocks
    nvidia_smi_error: str | None = None  # why it reports nothing
    matmul_tflops: float | None = None
    storage_write_gbs: float | None = None
    storage_read_gbs: float | None = None
    clock_ahead_seconds: float | None = None  # relative to the first node
    node_all_reduce_gbs: float | None = None  # bus bandwidth among its GPUs
    pair_all_reduce_gbs: dict[str, float] = field(default_factory=dict)  # other node > bus bandwidth of the pair
    seconds: float | None = None
    error: str | None = None  # what ended the measurement
    storage_error: str | None = None
    run_fault: str | None = None  # a fault of the run, not of a node, which would stop it on any nodes

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / f"{self.node}.json", json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Reason:
    """Why a node is bad. `cause` is the same for reasons that a setting of the job may give to all of its nodes; None:
    only a fault of the node itself gives it."""

    text: str
    cause: str | None = None


@dataclass(frozen=True)
class Limits:
    """Limits for a good node. Shares are relative to the median of the job's nodes; the other limits are off at 0."""

    matmul_share: float = 0.85  # GPUs of one kind differ by a few percent (power, temperature)
    all_reduce_share: float = 0.7
    storage_share: float = 0.2  # nodes share the file system, and measure it at the same time
    clock_seconds: float = 1.0  # more confuses logs and file times; training itself does not depend on clocks
    matmul_tflops: float = 0.0
    node_all_reduce_gbs: float = 0.0
    pair_all_reduce_gbs: float = 0.0
    storage_gbs: float = 0.0

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        for one in fields(cls):
            what = "share of the median" if one.name.endswith("_share") else "limit"
            parser.add_argument(f"--{one.name.replace('_', '-')}", type=float, default=one.default,
                                help=f"{what} (default {one.default})")


def read_reports(folder: Path) -> list[Report]:
    """Read the reports of the nodes; an incomplete report counts as none."""
    found = []
    for path in sorted(folder.glob("[!.]*.json")):  # hidden: incomplete, its writer was killed
        with contextlib.suppress(ValueError, TypeError):
            found.append(Report(**json.loads(path.read_text(encoding="utf-8"))))
    return found


def trouble_of_all(reports: Sequence[Report], nodes: Sequence[str], limits: Limits) -> str | None:
    """Return a fault of the run or of the storage, or what is wrong with all of `nodes` alike, for which no node is to
    blame; else None.

    Excluding several nodes that are bad for one cause would only bring more nodes of the same kind.
    """
    if fault := next((report.run_fault for report in reports if report.run_fault), None):
        return fault
    storage = {report.node: report.storage_error for report in reports if report.storage_error}
    if storage.keys() >= set(nodes):
        return storage[nodes[0]]
    bad = _reasons(reports, nodes, limits)
    for cause in [reason.cause for reason in bad[nodes[0]] if reason.cause and len(nodes) > 1]:
        common = {node: reason.text for node in nodes for reason in bad[node] if reason.cause == cause}
        if len(common) == len(nodes):
            named = "; ".join(f"{node}: {why}" for node, why in [*common.items()][:MOST_NAMED])
            more = f"; and {len(common) - MOST_NAMED} more" if len(common) > MOST_NAMED else ""
            return (f"no node of the job is good, so none is avoided: {named}{more}. Mend what they have in common "
                    "(GPUS, PREFLIGHT_LIMITS, PREFLIGHT_SECONDS, NVIDIA_DRIVER_CAPABILITIES=compute,utility in a "
                    "container), or set PREFLIGHT=0")
    return None


def nothing_known(reports: Sequence[Report]) -> str | None:
    """Return a line if nvidia-smi works on none of the nodes that reported, which is no fault of nodes whose GPUs
    compute; else None."""
    if not reports or not all(report.nvidia_smi_error for report in reports):
        return None
    return (f"{reports[0].nvidia_smi_error}, on each node that reported ({len(reports)}): ECC errors, row remappings "
            "and slowdowns are not checked")


def find_bad_nodes(reports: Sequence[Report], nodes: Sequence[str], limits: Limits) -> dict[str, str]:
    """Return the bad nodes of `nodes` with reasons: node > reasons."""
    return {node: ", ".join(reason.text for reason in reasons)
            for node, reasons in _reasons(reports, nodes, limits).items() if reasons}


def _reasons(reports: Sequence[Report], nodes: Sequence[str], limits: Limits) -> dict[str, list[Reason]]:
    """Return what is wrong with each of `nodes`; a good node has no reasons."""
    by_node = {report.node: report for report in reports}
    shared = len(reports) > 1 and all(report.storage_error for report in reports)  # so not these nodes' fault
    unknown = nothing_known(reports)
    bad: dict[str, list[Reason]] = {node: [] for node in nodes}
    for node in nodes:
        if (report := by_node.get(node)) is None:
            bad[node].append(Reason("no report of the check: dead, or slower than its limit"))
            continue
        if report.gpus < report.expected_gpus:
            bad[node].append(Reason(f"{report.gpus} of {report.expected_gpus} GPUs", GPU_COUNT))
        bad[node] += map(Reason, report.faults)
        if report.nvidia_smi_error and not unknown:
            bad[node].append(Reason(report.nvidia_smi_error))
        if report.storage_error and not shared:
            bad[node].append(Reason(report.storage_error))
        if report.matmul_tflops is None and report.error:  # failed by itself, before waiting for others
            bad[node].append(_failed(report.error))
    present = [by_node[node] for node in nodes if node in by_node]
    for what, unit, share, least, value in _rates(limits):
        found = {report.node: rate for report in present if (rate := value(report)) is not None}
        median = statistics.median(found.values()) if found else 0.0
        for node, rate in found.items():
            if rate < (wanted := max(least, share * median)):
                bad[node].append(Reason(f"{what} {rate:.3g} {unit}, expected {wanted:.3g} (median {median:.3g})",
                                        what if rate < least else None))
    ahead = {report.node: report.clock_ahead_seconds for report in present if report.clock_ahead_seconds is not None}
    middle = statistics.median(ahead.values()) if ahead else 0.0
    away = {node: seconds - middle for node, seconds in ahead.items() if abs(seconds - middle) > limits.clock_seconds}
    if 2 * len(away) < len(ahead):  # else no majority agrees on the time, as with two nodes
        for node, seconds in away.items():
            bad[node].append(Reason(f"clock {seconds:+.1f} s from the other nodes"))
    for node, reason in _slow_links(present, limits).items():
        bad[node].append(reason)
    failed = {report.node: report.error for report in present if report.error}
    waited = {node: error for node, error in failed.items() if error.startswith(NOT_DONE)}
    own = {node: error for node, error in failed.items()
           if node not in waited and ("CUDA error" in error or not LOST_A_PEER.search(error))}
    # An error may follow from another node's fault or death, if there is one; if all waited in vain, no one knows for
    # whom.
    if not any(bad.values()):
        for node, error in (own or (waited if len(failed) < len(nodes) else {})).items():
            bad[node].append(_failed(error))
    return bad


def _failed(error: str) -> Reason:
    """Return the reason of a measurement that failed; all nodes may do so for one cause, but for numbers such as those
    of addresses."""
    return Reason(error, re.sub(r"\d+", "", error))


def _slow_links(reports: Sequence[Report], limits: Limits) -> dict[str, Reason]:
    """Return nodes that are slow with both of their partners; if slow with one only, the partner may be the cause."""
    best = [max(report.pair_all_reduce_gbs.values()) for report in reports if report.pair_all_reduce_gbs]
    wanted = max(limits.pair_all_reduce_gbs, limits.all_reduce_share * statistics.median(best)) if best else 0.0
    return {report.node: Reason("all-reduce with " + " and ".join(
                f"{other} {rate:.3g} GB/s" for other, rate in report.pair_all_reduce_gbs.items()
            ) + f", expected {wanted:.3g}",
            "all-reduce of pairs" if max(report.pair_all_reduce_gbs.values()) < limits.pair_all_reduce_gbs else None)
            for report in reports if len(report.pair_all_reduce_gbs) > 1
            and all(rate < wanted for rate in report.pair_all_reduce_gbs.values())}


def _rates(limits: Limits) -> list[tuple[str, str, float, float, Callable[[Report], float | None]]]:
    """Return (name, unit, share of the median, minimum, getter) of each rate."""
    return [
        ("matmul", "TFLOP/s", limits.matmul_share, limits.matmul_tflops, lambda report: report.matmul_tflops),
        ("all-reduce within the node", "GB/s", limits.all_reduce_share, limits.node_all_reduce_gbs,
         lambda report: report.node_all_reduce_gbs),
        ("storage write", "GB/s", limits.storage_share, limits.storage_gbs, lambda report: report.storage_write_gbs),
        ("storage read", "GB/s", limits.storage_share, limits.storage_gbs, lambda report: report.storage_read_gbs),
    ]
