"""The kernels of attention side by side, over stand-ins for their libraries."""
import contextlib
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from hrm_megatron.config import ConfigError
from hrm_megatron.data.sampled import SampledFolder
from hrm_megatron.parallel.machine import Machine
from tests.attention import stand_ins
from tests.conftest import GOLDEN


def compared(single_rank, machine, lengths, row_tokens=64, rows=2):
    from hrm_megatron.benchmark.attention import compare_kernels

    return [*compare_kernels(machine, lengths, row_tokens, rows, heads=2, head_dim=16, rounds=1)]


@contextlib.contextmanager
def all_installed():
    with stand_ins.flash_attention_in_torch(), stand_ins.transformer_engine(), stand_ins.flash_attn(2, "2.8.3.post2"):
        machine = replace(Machine.here(), transformer_engine="2.16.1")
        with mock.patch.object(Machine, "here", return_value=machine):
            yield machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for a CPU")
def test_each_kernel_that_is_installed_is_timed(single_rank, monkeypatch):
    from hrm_megatron.benchmark import peak
    from hrm_megatron.benchmark.host import Launches

    prefixes, targets = SampledFolder(GOLDEN / "sampled").epoch_lengths(0)
    lengths = [(int(p), int(t) - 1) for p, t in zip(prefixes, targets, strict=True)]
    # Time is the number of operations: on a real clock other work decides which of two short runs takes longer.
    operations = Launches()
    monkeypatch.setattr(peak, "time", SimpleNamespace(perf_counter=lambda: operations.count))
    with all_installed() as machine, operations:
        lines = compared(single_rank, machine, lengths)
    assert [line.split()[0] for line in lines] == ["micro-batch", "kernel", "te", "varlen", "flash"]
    for line in lines[2:]:
        forward, both, rate = map(float, line.split()[1:])
        assert 0 < forward < both and rate >= 0, line


def test_each_that_is_not_is_named(single_rank):
    machine = Machine((9, 0), None, flash=False)
    lines = compared(single_rank, machine, [(5, 7)])
    assert [line.split()[0] for line in lines[2:]] == ["te", "varlen", "flash"]
    assert "Transformer Engine is not installed" in lines[2] and "without FlashAttention" in lines[3]
    assert "not installed" in lines[4]
    nowhere = compared(single_rank, Machine(), [(5, 7)])
    assert all("there is none" in line for line in nowhere[2:5]) and float(nowhere[5].split()[1]) > 0  # the CPU's


def test_rows_are_filled_with_examples_in_their_turn():
    from hrm_megatron.benchmark.attention import fill_rows

    assert fill_rows([(5, 7), (20, 4), (1, 0)], 40, 2) == [[(5, 7), (20, 4), (1, 0)], [(5, 7), (20, 4), (1, 0)]]
    assert fill_rows([(30, 1)], 40, 3) == [[(30, 1)]] * 3
    with pytest.raises(ConfigError, match="--row-tokens 40: an example has 41; give at least as many"):
        fill_rows([(30, 1), (40, 1)], 40, 1)
