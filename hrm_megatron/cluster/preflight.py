"""Check a node before a run uses it: `python -m hrm_megatron.cluster.preflight`, one task per node.

A report is written before the nodes communicate and again afterwards, so that an unreachable node is known by what its
report lacks. Without GPUs the CPU is measured instead, over gloo.
"""
from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import multiprocessing
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, start_processes

from hrm_megatron.cluster.host import node_name, raise_file_limit
from hrm_megatron.cluster.node_check import NOT_DONE, Report

MATMUL_SIZE, ALL_REDUCE_BYTES, STORAGE_BYTES = 8192, 256 << 20, 256 << 20
CPU_MATMUL_SIZE, CPU_ALL_REDUCE_BYTES = 512, 4 << 20
WARMUP_ROUNDS, ROUNDS = 3, 5  # the first round connects
WARMUP_SECONDS = 0.5  # for the clocks of an idle GPU to rise
# From a node's time limit until it exits, which breaks the connections of others, that may have started this much
# later.
GRACE_SECONDS = 10.0
# Queries of nvidia-smi (`--help-query-gpu`); unsupported ones give N/A or Not Supported.
FAULTS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors",
    "remapped_rows.failure": "failed row remappings",
    "remapped_rows.pending": "pending row remappings",
    "clocks_throttle_reasons.hw_thermal_slowdown": "thermal slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "power brake slowdown",
}
FINE = ("0", "No", "Not Active", "N/A", "[N/A]", "[Not Supported]", "Not Supported")


def look_at_gpus() -> tuple[list[str], str | None]:
    """Return the faults that nvidia-smi reports, and an error if it does not work."""
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu=index,{','.join(FAULTS)}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return [], "nvidia-smi: not found"
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi does not answer"
    if done.returncode:
        return [], f"nvidia-smi: {(done.stderr or done.stdout).strip()}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [f"GPU {index}: {name} ({value})" for index, *values in rows
            for name, value in zip(FAULTS.values(), values, strict=True) if value not in FINE], None


def storage_gbs(folder: Path, size_bytes: int = STORAGE_BYTES) -> tuple[float, float]:
    """Write and read a file in the run's folder, bypassing the page cache as far as possible; return GB/s of both."""
    block = os.urandom(min(size_bytes, 16 << 20))
    blocks = size_bytes // len(block)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:  # unnamed, so it vanishes even if killed
        begun = time.perf_counter()
        for _ in range(blocks):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        reading = time.perf_counter()
        while file.read(len(block)):
            continue
        read = time.perf_counter()
    return blocks * len(block) / (written - begun) / 1e9, blocks * len(block) / (read - reading) / 1e9


def _timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _best_seconds(run: Callable[[], object]) -> float:
    """Return the best time of a fixed number of runs, the same on every process since `run` may be a collective."""
    return min(_timed(run) for _ in range(WARMUP_ROUNDS + ROUNDS))


def matmul_tflops() -> float:
    """Return the best rate of matmuls: bf16 on a GPU, fp32 on a CPU."""
    cuda = torch.cuda.is_available()
    size = MATMUL_SIZE if cuda else CPU_MATMUL_SIZE
    a, b = (torch.randn(size, size, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)
            for _ in range(2))

    def multiply() -> torch.Tensor:
        return a @ b

    warm = time.perf_counter() + WARMUP_SECONDS
    while cuda and time.perf_counter() < warm:  # let clocks rise under load
        _timed(multiply)
    return 2 * size ** 3 / _best_seconds(multiply) / 1e12


def all_reduce_gbs(group: dist.ProcessGroup) -> float:
    """Return the bus bandwidth of an all-reduce: 2 (n - 1) / n of its bytes cross each link."""
    cuda, n = torch.cuda.is_available(), group.size()
    size = ALL_REDUCE_BYTES if cuda else CPU_ALL_REDUCE_BYTES
    buffer = torch.ones(size // 4, device="cuda" if cuda else "cpu")

    def reduce() -> None:
        dist.all_reduce(buffer, group=group)

    return 2 * (n - 1) / n * size / _best_seconds(reduce) / 1e9


def clock_ahead_seconds(rank: int, first_ranks: list[int]) -> float:
    """Return how far this node's clock is ahead of the first node's, accurate to half a round trip. Nodes ask the first
    in turn."""
    ahead, theirs = 0.0, torch.zeros(1, dtype=torch.float64)
    for other, _ in itertools.product(first_ranks[1:], range(2)):  # twice: the first time connects
        if rank == 0:
            dist.recv(theirs, src=other)
            dist.send(torch.tensor([time.time()], dtype=torch.float64), dst=other)
        elif rank == other:
            begun = time.time()
            dist.send(theirs, dst=0)
            dist.recv(theirs, src=0)
            ahead = (begun + time.time()) / 2 - float(theirs)
    return ahead


def rounds_of_pairs(nodes: int) -> list[list[tuple[int, int]]]:
    """Return rounds of disjoint pairs in which every node gets two partners, if there are enough nodes: the edges of a
    ring, in at most three rounds."""
    rounds = [[(first, first + 1) for first in range(start, nodes - 1, 2)] for start in (0, 1)] + [[]]
    if nodes > 2:
        rounds[1 + nodes % 2].append((0, nodes - 1))
    return [pairs for pairs in rounds if pairs]


def group_of(nodes: Sequence[int], per_node: int) -> dist.ProcessGroup:
    """Return a process group of all processes of these nodes; no other process takes part in creating it.

    All members must have created equally many groups before, since torch names a group by its ranks and that count.
    """
    return dist.new_group([node * per_node + local for node in nodes for local in range(per_node)],
                          use_local_synchronization=True)


def measure_process(local_rank: int, options: argparse.Namespace, results: SimpleQueue[tuple[str, Any]],
                    alone_done: Barrier) -> None:
    """Measure as the process of one GPU: alone, then within the node, then with other nodes."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(1)
    results.put(("matmul", matmul_tflops()))
    alone_done.wait()
    per_node, nodes = options.processes, options.nodes
    rank = options.node * per_node + local_rank
    # nodes wait until the slowest has finished measuring alone
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=f"tcp://{options.master}", rank=rank,
                            world_size=nodes * per_node,
                            timeout=timedelta(seconds=options.timeout_seconds + GRACE_SECONDS))
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, node_name())
    ahead = clock_ahead_seconds(rank, list(range(0, nodes * per_node, per_node)))
    if local_rank == 0:
        results.put(("clock", ahead))
    if per_node > 1:
        results.put(("node", all_reduce_gbs(group_of([options.node], per_node))))
    for pairs in rounds_of_pairs(nodes):  # the pairs of a round run at once, since training loads all links too
        pair = next((pair for pair in pairs if options.node in pair), (options.node,))
        group = group_of(pair, per_node)
        for other in {*pair} - {options.node}:
            rate = all_reduce_gbs(group)
            if local_rank == 0:
                results.put(("pair", (names[other * per_node], rate)))
        dist.barrier()
    dist.destroy_process_group()


def measure_node(options: argparse.Namespace) -> Report:
    """Measure this node and write its report, before and after communicating."""
    begun = time.monotonic()
    report = Report(node_name(), torch.cuda.device_count(), options.gpus)
    options.processes = report.gpus or 1
    report.run_fault = raise_file_limit(options.nodes * options.processes)
    if report.run_fault:
        report.write(options.output)
        return report
    if options.gpus or report.gpus:
        report.faults, report.nvidia_smi_error = look_at_gpus()
    try:
        report.storage_write_gbs, report.storage_read_gbs = storage_gbs(options.storage, options.storage_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            report.run_fault = f"no space for {options.storage_bytes >> 20} MiB per node in {options.storage}"
        else:
            report.storage_error = f"storage {options.storage}: {error.strerror}"
    if options.node == 0 and options.training_port is not None:
        report.run_fault = report.run_fault or look_at_port(options.training_port)
    context = multiprocessing.get_context("spawn")
    results: SimpleQueue[tuple[str, Any]] = context.SimpleQueue()
    alone_done = context.Barrier(options.processes + 1)
    running = start_processes(measure_process, (options, results, alone_done), options.processes, join=False)
    deadline = begun + options.timeout_seconds
    try:
        while alone_done.n_waiting < options.processes:
            running.join(timeout=0.1)  # raises the error of a failed process
            if time.monotonic() >= deadline:
                raise TimeoutError(f"what is measured alone was not done after {options.timeout_seconds:g} s")
        alone_done.wait()
        _take(results, report)
        report.write(options.output)
        if not _ended(running, deadline):
            report.error = f"{NOT_DONE} {options.timeout_seconds:g} s"
            report.write(options.output)
            with contextlib.suppress(Exception):  # errors from other nodes that end
                if _ended(running, deadline + GRACE_SECONDS):
                    report.error = None
    except Exception as error:  # any error goes into the report; find_bad_nodes decides who is to blame
        report.error = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        if "EADDRINUSE" in report.error:
            report.run_fault = taken(options.master.rpartition(":")[2])
        elif os.strerror(errno.EMFILE) in report.error:
            report.run_fault = f"{report.error} ({report.node}): raise the limit of open files (ulimit -Hn)"
    for process in running.processes:
        process.kill()
    if report.matmul_tflops is not None:  # else a GPU failed by itself, which the others' rates would hide
        _take(results, report)
    report.seconds = time.monotonic() - begun
    report.write(options.output)
    return report


def _ended(running: ProcessContext, deadline: float) -> bool:
    """Whether all processes have ended by `deadline`; raises the error of a failed one."""
    while not running.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            return False
    return True


def look_at_port(port: int) -> str | None:
    """Return an error if training's port is taken: its ranks would otherwise connect to another job's without
    noticing."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return taken(port) if error.errno == errno.EADDRINUSE else None
    return None


def taken(port: int | str) -> str:
    return f"port {port} is taken on {node_name()}: set MASTER_PORT"


def _take(results: SimpleQueue[tuple[str, Any]], report: Report) -> None:
    while not results.empty():
        what, value = results.get()
        if what == "matmul":
            report.matmul_tflops = min(value, report.matmul_tflops or value)
        elif what == "node":
            report.node_all_reduce_gbs = min(value, report.node_all_reduce_gbs or value)
        elif what == "clock":
            report.clock_ahead_seconds = value
        else:
            report.pair_all_reduce_gbs[value[0]] = value[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hrm_megatron.cluster.preflight", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the nodes' reports")
    parser.add_argument("--storage", type=Path, required=True, help="folder whose speed counts: the run's")
    parser.add_argument("--storage-bytes", type=int, default=STORAGE_BYTES, help="size of the file there")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs that the node should have")
    parser.add_argument("--nodes", type=int, default=int(os.environ.get("SLURM_NNODES", "1")))
    parser.add_argument("--node", type=int, default=int(os.environ.get("SLURM_NODEID", "0")))
    parser.add_argument("--master", required=True, help="host:port at which the nodes meet")
    parser.add_argument("--training-port", type=int, help="port of the first node that training will need")
    parser.add_argument("--timeout-seconds", type=float, default=60.0)
    measure_node(parser.parse_args())


if __name__ == "__main__":
    main()
