"""Which nodes are bad, by what each measured of itself: plain rules over reports, no node is asked again."""
from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from hrm_megatron.cluster.failures import LOST_A_PEER
from hrm_megatron.program import write_aside

NOT_DONE = "the nodes were not done after"  # begins the error of one that waited for others in vain


@dataclass
class Report:
    """What a node measured. Rates are of its slowest GPU, or of its CPU; None: not measured, or not reached."""

    node: str
    gpus: int
    expected_gpus: int
    faults: list[str] = field(default_factory=list)  # what nvidia-smi knows: ECC, rows, clocks
    matmul_tflops: float | None = None
    storage_write_gbs: float | None = None
    storage_read_gbs: float | None = None
    clock_ahead_seconds: float | None = None  # of the first node's
    node_all_reduce_gbs: float | None = None  # bus bandwidth among its GPUs
    pair_all_reduce_gbs: dict[str, float] = field(default_factory=dict)  # other node > bus bandwidth between both
    seconds: float | None = None
    error: str | None = None  # what ended the measurement
    storage_error: str | None = None
    run_fault: str | None = None  # what no node is to blame for, and would keep the run from training anywhere

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / f"{self.node}.json", json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Limits:
    """What a good node has. Shares are of the median of the job's nodes; the other limits are off at 0."""

    matmul_share: float = 0.85  # GPUs of a kind differ by some percent (power, temperature)
    all_reduce_share: float = 0.7
    storage_share: float = 0.2  # nodes share the file system, and measure it at the same time
    clock_seconds: float = 1.0  # more confuses logs and file times; training itself asks no clock
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
    """Read what the nodes wrote; a report that is not whole counts as none."""
    found = []
    for path in sorted(folder.glob("[!.]*.json")):  # hidden: half of one, whose writer was killed
        with contextlib.suppress(ValueError, TypeError):
            found.append(Report(**json.loads(path.read_text(encoding="utf-8"))))
    return found


def trouble_of_all(reports: Sequence[Report], nodes: Sequence[str]) -> str | None:
    """Say what is no node's fault, but the run's, or of the storage that all of `nodes` share."""
    storage = {report.node: report.storage_error for report in reports if report.storage_error}
    return next((report.run_fault for report in reports if report.run_fault),
                storage[nodes[0]] if storage.keys() >= set(nodes) else None)


def find_bad_nodes(reports: Sequence[Report], nodes: Sequence[str], limits: Limits) -> dict[str, str]:
    """Name each bad node of `nodes` and why: node > reasons."""
    by_node = {report.node: report for report in reports}
    shared = len(reports) > 1 and all(report.storage_error for report in reports)  # and not of these nodes
    bad: dict[str, list[str]] = {node: [] for node in nodes}
    for node in nodes:
        if (report := by_node.get(node)) is None:
            bad[node].append("no report of the check: dead, or slower than its limit")
            continue
        if report.gpus < report.expected_gpus:
            bad[node].append(f"{report.gpus} of {report.expected_gpus} GPUs")
        bad[node] += report.faults
        if report.storage_error and not shared:
            bad[node].append(report.storage_error)
        if report.matmul_tflops is None and report.error:  # it failed alone, before it could wait for another
            bad[node].append(report.error)
    present = [by_node[node] for node in nodes if node in by_node]
    for what, unit, share, least, value in _rates(limits):
        found = {report.node: rate for report in present if (rate := value(report)) is not None}
        median = statistics.median(found.values()) if found else 0.0
        for node, rate in found.items():
            if rate < (wanted := max(least, share * median)):
                bad[node].append(f"{what} {rate:.3g} {unit}, expected {wanted:.3g} (median {median:.3g})")
    ahead = {report.node: report.clock_ahead_seconds for report in present if report.clock_ahead_seconds is not None}
    middle = statistics.median(ahead.values()) if ahead else 0.0
    for node, seconds in ahead.items():
        if abs(seconds - middle) > limits.clock_seconds:
            bad[node].append(f"clock {seconds - middle:+.1f} s from the other nodes")
    for node, reason in _slow_links(present, limits).items():
        bad[node].append(reason)
    failed = {report.node: report.error for report in present if report.error}
    waited = {node: error for node, error in failed.items() if error.startswith(NOT_DONE)}
    own = {node: error for node, error in failed.items()
           if node not in waited and ("CUDA error" in error or not LOST_A_PEER.search(error))}
    # An error follows from another node's fault, where there is one, or from its end; if all waited in vain, nobody
    # knows for whom.
    if not any(bad.values()):
        for node, error in (own or (waited if len(failed) < len(nodes) else {})).items():
            bad[node].append(error)
    return {node: ", ".join(reasons) for node, reasons in bad.items() if reasons}


def _slow_links(reports: Sequence[Report], limits: Limits) -> dict[str, str]:
    """Blame a node that is slow with two partners; with one it may be the partner."""
    best = [max(report.pair_all_reduce_gbs.values()) for report in reports if report.pair_all_reduce_gbs]
    wanted = max(limits.pair_all_reduce_gbs, limits.all_reduce_share * statistics.median(best)) if best else 0.0
    return {report.node: "all-reduce with " + " and ".join(
                f"{other} {rate:.3g} GB/s" for other, rate in report.pair_all_reduce_gbs.items()
            ) + f", expected {wanted:.3g}"
            for report in reports if len(report.pair_all_reduce_gbs) > 1
            and all(rate < wanted for rate in report.pair_all_reduce_gbs.values())}


def _rates(limits: Limits) -> list[tuple[str, str, float, float, Callable[[Report], float | None]]]:
    """List (what, unit, share of the median, least, how to read it)."""
    return [
        ("matmul", "TFLOP/s", limits.matmul_share, limits.matmul_tflops, lambda report: report.matmul_tflops),
        ("all-reduce within the node", "GB/s", limits.all_reduce_share, limits.node_all_reduce_gbs,
         lambda report: report.node_all_reduce_gbs),
        ("storage write", "GB/s", limits.storage_share, limits.storage_gbs, lambda report: report.storage_write_gbs),
        ("storage read", "GB/s", limits.storage_share, limits.storage_gbs, lambda report: report.storage_read_gbs),
    ]
