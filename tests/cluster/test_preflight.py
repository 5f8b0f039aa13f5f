"""What a node measures of itself: three nodes of one process each on this CPU, and what nvidia-smi may say."""
from __future__ import annotations

import errno
import itertools
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from unittest.mock import Mock

import pytest

from hrm_megatron.cluster import host, preflight
from hrm_megatron.cluster.node_check import NOT_DONE, Limits, find_bad_nodes, read_reports
from tests.ports import free_port

NODES = ("n1", "n2", "n3")
FEW_FILES = 24  # as few for these as a login shell's 1,024 are for hundreds of GPUs


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports of nodes that check themselves at the same time."""
    folder, port = tmp_path_factory.mktemp("preflight"), free_port()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    running = [subprocess.Popen(
        [sys.executable, "-m", "hrm_megatron.cluster.preflight", "--output", folder / "reports", "--storage", folder,
         "--storage-bytes", str(1 << 20), "--gpus", "0", "--nodes", str(len(NODES)), "--node", str(node),
         "--master", f"127.0.0.1:{port}", "--timeout-seconds", "200"], env={**os.environ, "SLURMD_NODENAME": name},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, hard)))
        for node, name in enumerate(NODES)]
    assert [process.wait() for process in running] == [0] * len(NODES)
    assert sorted(path.name for path in folder.iterdir()) == ["reports"]  # nothing of the storage's check is left
    return read_reports(folder / "reports")


def test_nodes_measure_all_that_a_cpu_has(reports):
    assert [report.node for report in reports] == [*NODES]
    for report in reports:
        assert report.error is None and not report.faults
        assert report.matmul_tflops > 0 and report.storage_write_gbs > 0 and report.storage_read_gbs > 0
        assert {report.node, *report.pair_all_reduce_gbs} == {*NODES} and min(report.pair_all_reduce_gbs.values()) > 0
        assert abs(report.clock_ahead_seconds) < report.seconds  # one clock; a round trip is part of the check
        assert report.node_all_reduce_gbs is None  # one process
    good = Limits(matmul_share=0, all_reduce_share=0, storage_share=0, clock_seconds=reports[0].seconds)
    assert not find_bad_nodes(reports, NODES, good)


def measure(tmp_path, monkeypatch, *flags, nodes="2"):
    """The report of the first of the nodes, which this process is."""
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr(sys, "argv", ["preflight", *map(str, [
        "--output", tmp_path / "reports", "--storage", tmp_path, "--storage-bytes", 1 << 20, "--gpus", 0, "--nodes",
        nodes, "--node", 0, "--master", f"127.0.0.1:{free_port()}", *flags])])
    preflight.main()
    return read_reports(tmp_path / "reports")[0]


def fails(*_):
    raise RuntimeError("CUDA error: uncorrectable ECC error")


def test_a_gpu_that_fails_alone_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "measure_process", fails)
    found = measure(tmp_path, monkeypatch, "--timeout-seconds", 200)
    assert found.error == "RuntimeError: CUDA error: uncorrectable ECC error" and found.seconds < 100
    assert list(find_bad_nodes([found], ["n1"], Limits())) == ["n1"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_the_runs_fault(tmp_path, monkeypatch, number):
    def full(folder, size_bytes):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(preflight, "storage_gbs", full)
    monkeypatch.setattr(preflight, "measure_process", fails)
    found = measure(tmp_path, monkeypatch)
    said = dict(run_fault=f"no space for 1 MiB per node in {tmp_path}", storage_error=None)
    if number == errno.EIO:
        said = dict(run_fault=None, storage_error=f"storage {tmp_path}: {os.strerror(number)}")
    assert dict(run_fault=found.run_fault, storage_error=found.storage_error) == said


def test_a_port_that_is_taken_is_nobodys_fault(tmp_path, monkeypatch):
    with socket.create_server(("", free_port())) as other:
        port = other.getsockname()[1]
        assert preflight.look_at_port(port) == f"port {port} is taken on {preflight.node_name()}: set MASTER_PORT"
        for flag in (f"--master=127.0.0.1:{port}", f"--training-port={port}"):
            found = measure(tmp_path, monkeypatch, flag, nodes="1")
            assert found.run_fault == f"port {port} is taken on n1: set MASTER_PORT"
    assert preflight.look_at_port(port) is None


def test_a_kill_leaves_nothing_of_the_storages_check(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.os, "fsync", lambda _: names.extend(tmp_path.iterdir()))
    names = []
    assert min(preflight.storage_gbs(tmp_path, 1 << 20)) > 0 and not names


@pytest.mark.parametrize("seconds_of_a_call", [1e-6, 10.0])
def test_every_process_of_a_collective_calls_it_as_often(monkeypatch, seconds_of_a_call):
    """On GPUs too: one that called it once more would wait for the others for ever."""
    clock, calls = itertools.count(step=seconds_of_a_call), []
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(preflight.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(preflight.dist, "all_reduce", lambda buffer, group: calls.append(len(buffer)))
    stock = preflight.torch.ones
    monkeypatch.setattr(preflight.torch, "ones", lambda size, device: stock(8))

    class Group:
        def size(self):
            return 2

    assert preflight.all_reduce_gbs(Group()) == pytest.approx(preflight.ALL_REDUCE_BYTES / seconds_of_a_call / 1e9)
    assert len(calls) == preflight.WARMUP_ROUNDS + preflight.ROUNDS


def test_what_a_node_waits_for_does_not_grow_with_the_nodes(monkeypatch):
    def waits(nodes):
        dist = Mock(**{"get_world_size.return_value": nodes})
        monkeypatch.setattr(preflight, "dist", dist)
        preflight.measure_process(0, Namespace(processes=1, nodes=nodes, node=2, master="", timeout_seconds=1), Mock(),
                                  Mock())
        return dist.new_group.call_count, dist.barrier.call_count

    monkeypatch.setattr(preflight.torch, "set_num_threads", lambda _: None)
    for name in ("matmul_tflops", "clock_ahead_seconds", "all_reduce_gbs"):
        monkeypatch.setattr(preflight, name, lambda *_: 1.0)
    assert waits(6) == waits(64) == (2, 2) and waits(7) == (3, 3)


class HangingPair:
    """Stands in for the processes of a node that wait for another node's: until `done`, in monotonic seconds, or for
    good."""

    def __init__(self, done):
        self.done, self.processes, self.partner, self.killed = done, [self], None, threading.Event()

    def join(self, timeout):
        if self.partner.killed.wait(max(0, min(timeout, self.done - time.monotonic()))):
            raise RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:51405")
        return time.monotonic() >= self.done

    def kill(self):
        if time.monotonic() < self.done:
            self.killed.set()


@pytest.mark.parametrize("seconds, error", [(99, f"{NOT_DONE} 3 s"), (4.5, None)], ids=["for good", "until the grace"])
def test_nobody_is_blamed_for_a_pair_that_hangs_where_nodes_start_one_after_the_other(tmp_path, monkeypatch, seconds,
                                                                                       error):
    begun = time.monotonic()
    pair = [HangingPair(begun + seconds) for _ in range(2)]
    pair[0].partner, pair[1].partner = pair[1], pair[0]

    def start(measure, arguments, nprocs, join):
        options, results, alone_done = arguments
        results.put(("matmul", 1.0))
        for _ in range(nprocs):
            threading.Thread(target=alone_done.wait).start()
        return pair[options.node]

    monkeypatch.setattr(preflight, "GRACE_SECONDS", 3)
    monkeypatch.setattr(preflight, "start_processes", start)
    monkeypatch.setattr(preflight, "storage_gbs", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(preflight, "node_name", lambda: threading.current_thread().name)
    nodes = [threading.Thread(name=NODES[node], target=preflight.measure_node, args=[Namespace(
        gpus=0, storage=tmp_path, storage_bytes=0, nodes=2, node=node, training_port=None, timeout_seconds=3,
        output=tmp_path)])
        for node in range(2)]
    nodes[0].start()
    time.sleep(1.5)
    nodes[1].start()
    for node in nodes:
        node.join()
    reports = read_reports(tmp_path)
    assert [report.error for report in reports] == [error] * 2
    assert not find_bad_nodes(reports, NODES[:2], Limits())


def test_what_nvidia_smi_knows_is_a_fault(tmp_path, monkeypatch):
    def says(text, code=0):
        place = tmp_path / "nvidia-smi"
        place.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
        place.chmod(0o755)
        return preflight.look_at_gpus()

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fine = ", 0, No, No, Not Active, Not Active\\n"
    assert says(f"0{fine}1{fine}") == ([], None)
    assert says(f"0{fine}1, [N/A], [N/A], [N/A], Not Active, Not Active\\n") == ([], None)
    assert says(f"0{fine}1, 3, No, Yes, Active, Not Active\\n") == ([
        "GPU 1: uncorrected ECC errors (3)", "GPU 1: pending row remappings (Yes)", "GPU 1: thermal slowdown (Active)"],
        None)
    assert says("Unable to determine the device handle\\n", code=9) == (
        [], "nvidia-smi: Unable to determine the device handle")
    (tmp_path / "nvidia-smi").unlink()
    assert preflight.look_at_gpus() == ([], "nvidia-smi: not found")


def test_gpus_are_counted_by_torch(tmp_path, monkeypatch):
    """A container may have them without nvidia-smi."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(preflight, "measure_process", fails)
    found = measure(tmp_path, monkeypatch, "--gpus", 2, nodes="1")
    assert (found.gpus, found.faults, found.nvidia_smi_error) == (2, [], "nvidia-smi: not found")
    found = measure(tmp_path, monkeypatch, nodes="1")  # none are expected, but there are some
    assert (found.gpus, found.nvidia_smi_error) == (2, "nvidia-smi: not found")


def too_many(*_):
    raise RuntimeError("[enforce fail at gloo/transport/tcp/socket.cc:24] fd != -1. socket: Too many open files")


def test_a_limit_of_open_files_is_nobodys_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "measure_process", too_many)
    assert "socket: Too many open files (n1): raise the limit" in measure(tmp_path, monkeypatch).run_fault
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: (1024, 1024))
    said = "a process on n1 may open 1024 files (ulimit -Hn), and 400 ranks need 1056: raise that limit"
    assert measure(tmp_path, monkeypatch, nodes="400").run_fault.startswith(said)
