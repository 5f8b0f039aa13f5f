"""What a machine gives a launcher: open files, and cores beside each GPU where the launcher could bind to them."""
from __future__ import annotations

import os
import re
import resource

import pytest

from hrm_megatron.cluster import host
from hrm_megatron.config import ConfigError


@pytest.mark.parametrize("limits, ranks, files, enough", [
    ((1024, 524288), 4096, 524288, True),
    ((1024, 4096), 2048, 4096, False),
    ((1024, resource.RLIM_INFINITY), 4096, host.MOST_FILES, True),
    ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 4096, None, True),
    ((4096, 4096), 8, None, True),
])
def test_a_job_has_all_the_files_that_it_may_open(monkeypatch, limits, ranks, files, enough):
    raised = []
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(host.resource, "setrlimit", lambda _, now: raised.append(now))
    said = host.raise_file_limit(ranks)
    assert raised == ([] if files is None else [(files, limits[1])])
    assert said is None if enough else re.match(r"a process on \S+ may open 4096 files .* 2048 ranks need 4352: ", said)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine: its GPUs, its NUMA nodes and what numactl does."""
    own = sorted(os.sched_getaffinity(0))

    def make(gpus=1, numa_nodes=2, numactl="exit 0", foreign=False):
        (tmp_path / "dev").mkdir()
        for gpu in range(gpus):
            (tmp_path / "dev" / f"nvidia{gpu}").touch()
        for node in range(numa_nodes):
            core = 4096 if foreign and node else own[0]  # all have the same one here
            (tmp_path / "numa" / f"node{node}" / f"cpu{core}").mkdir(parents=True)
        (tmp_path / "numa" / "node9" / "memory0").mkdir(parents=True)
        if numactl:
            (tmp_path / "numactl").write_text(f"#!/bin/sh\n{numactl}\n")
            (tmp_path / "numactl").chmod(0o755)

    monkeypatch.setattr(host, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(host, "NUMA_NODES", tmp_path / "numa")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


def test_ranks_are_bound_where_that_can_be(machine, capsys):
    machine()
    assert host.numa_flags(None) == ["--numa-binding", "node"]
    assert host.numa_flags("exclusive") == ["--numa-binding", "exclusive"]
    assert host.numa_flags("none") == [] and not capsys.readouterr().err


@pytest.mark.parametrize("lack, said", [
    (dict(numactl=None), "numactl is not installed"),
    (dict(numactl="echo 'numactl: This system does not support NUMA policy' >&2; exit 1"), "not support NUMA policy"),
    (dict(foreign=True), "the job has no cores of one of its NUMA nodes"),
    (dict(gpus=0), None),
    (dict(numa_nodes=1), None),
])
def test_ranks_are_not_bound_where_torchrun_would_fail_or_that_changes_nothing(machine, lack, said, capsys):
    machine(**lack)
    assert host.numa_flags(None) == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (said is not None) and all(said in line for line in lines)


@pytest.mark.parametrize("lack, said", [(dict(numactl=None), "numactl is not installed"), (dict(gpus=0), "no GPU")])
def test_a_binding_that_was_asked_for_and_cannot_be_is_refused(machine, lack, said):
    machine(**lack)
    with pytest.raises(ConfigError, match=rf"--numa-binding node on \S+: .*{said}; mend that, or say none \(NUMA=none"):
        host.numa_flags("node")


@pytest.mark.parametrize("visible, flags", [
    ("", []), ("-1", []), ("-1,0", []), ("NoDevFiles", []), ("0,-1", ["--numa-binding", "node"])])
def test_hidden_gpus_are_none(machine, monkeypatch, visible, flags):
    machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert host.numa_flags(None) == flags
