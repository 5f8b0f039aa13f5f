"""What a node measures of itself: two nodes of one process each on this CPU, and what nvidia-smi may say."""
from __future__ import annotations

import errno
import itertools
import os
import socket
import subprocess
import sys

import pytest

from hrm_megatron.cluster import preflight
from hrm_megatron.cluster.node_check import Limits, find_bad_nodes, read_reports
from tests.ports import free_port

NODES = ("n1", "n2")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports of two nodes that check themselves at the same time."""
    folder, port = tmp_path_factory.mktemp("preflight"), free_port()
    running = [subprocess.Popen(
        [sys.executable, "-m", "hrm_megatron.cluster.preflight", "--output", folder / "reports", "--storage", folder,
         "--storage-bytes", str(1 << 20), "--gpus", "0", "--nodes", "2", "--node", str(node), "--master",
         f"127.0.0.1:{port}", "--timeout-seconds", "200"], env={**os.environ, "SLURMD_NODENAME": name})
        for node, name in enumerate(NODES)]
    assert [process.wait() for process in running] == [0, 0]
    assert sorted(path.name for path in folder.iterdir()) == ["reports"]  # nothing of the storage's check is left
    return read_reports(folder / "reports")


def test_nodes_measure_all_that_a_cpu_has(reports):
    assert [report.node for report in reports] == [*NODES]
    for report, other in zip(reports, reversed(reports), strict=True):
        assert report.error is None and not report.faults
        assert report.matmul_tflops > 0 and report.storage_write_gbs > 0 and report.storage_read_gbs > 0
        assert list(report.pair_all_reduce_gbs) == [other.node] and report.pair_all_reduce_gbs[other.node] > 0
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


def test_what_nvidia_smi_knows_is_a_fault(tmp_path, monkeypatch):
    def says(text, code=0):
        place = tmp_path / "nvidia-smi"
        place.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
        place.chmod(0o755)
        return preflight.look_at_gpus()

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fine = ", 0, No, No, Not Active, Not Active\\n"
    assert says(f"0{fine}1{fine}") == (2, [])
    assert says(f"0{fine}1, [N/A], [N/A], [N/A], Not Active, Not Active\\n") == (2, [])
    assert says(f"0{fine}1, 3, No, Yes, Active, Not Active\\n") == (2, [
        "GPU 1: uncorrected ECC errors (3)", "GPU 1: pending row remappings (Yes)", "GPU 1: thermal slowdown (Active)"])
    assert says("Unable to determine the device handle\\n", code=9) == (
        0, ["nvidia-smi: Unable to determine the device handle"])


def test_without_nvidia_smi_there_are_no_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preflight.look_at_gpus() == (0, [])
