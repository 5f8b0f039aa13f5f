"""Loops on torch's threads: each row once, whatever threads there are, and no failure is lost."""
from __future__ import annotations

import _ctypes
import ctypes
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch

from hrm_megatron.layers.threads import ALONE, BODY, functions_of, on_threads


@numba.njit(nogil=True)
def mark(first, last, times, firsts):
    for row in range(first, last):
        times[row] += 1
        firsts[row] = first


@numba.njit(nogil=True)
def mark_rows(threads, times, firsts):
    on_threads(mark, threads, len(times), (times, firsts))


@numba.njit(nogil=True)
def take(first, last, sizes, taken):
    for row in range(first, last):
        taken[row] = len(np.empty(sizes[row], np.uint8))


@numba.njit(nogil=True)
def take_rows(threads, sizes, taken):
    on_threads(take, threads, len(sizes), (sizes, taken))


@pytest.mark.parametrize(("threads", "rows", "begins"), [
    (1, 5, [0]), (3, 7, [0, 2, 4]), (3, 2, [0, 1]), (2, 0, []), (5, 1000, [0, 200, 400, 600, 800])])
def test_each_row_is_in_one_part(threads, rows, begins):
    times, firsts = np.zeros(rows, np.int64), np.full(rows, -1)
    mark_rows(threads, times, firsts)
    assert (times == 1).all() and np.unique(firsts).tolist() == begins


def test_a_part_without_memory_is_an_error_after_the_others_have_ended():
    sizes, taken = np.asarray([10, 1 << 60, 30]), np.zeros(3, np.int64)
    with pytest.raises(MemoryError):
        take_rows(3, sizes, taken)
    assert taken.tolist() == [10, 0, 30]


# Of rows that three threads norm after torch has done something on three: how many threads that adds.
NORM = """
import _ctypes, ctypes, os, torch
if not {openmp}:
    torch._C.__file__ = _ctypes.__file__
from hrm_megatron.layers import on_cpu
torch.set_num_threads(3)
x = torch.ones(1 << 20).exp().view(-1, 1 << 10)
on_cpu.norm_in_loops(x[:1], 0.0)  # loads numba
before = len(os.listdir("/proc/self/task"))
assert on_cpu.threads_for(x.nbytes) == 3
assert torch.allclose(on_cpu.norm_in_loops(x, 0.0), torch.ones(()))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("openmp", [True, False])
def test_no_thread_is_added_to_torchs(openmp):
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", NORM.format(openmp=openmp)], capture_output=True,
                         text=True, check=True)
    assert ran.stdout == "0\n"


@pytest.mark.skipif(sys.platform != "linux", reason="torch for Linux is linked with OpenMP")
def test_torchs_openmp_is_found():
    assert functions_of(ctypes.CDLL(torch._C.__file__)) is not ALONE


def test_without_openmp_one_thread_does_all():
    assert functions_of(ctypes.CDLL(_ctypes.__file__)) is ALONE
    seen = []
    ALONE["GOMP_parallel"](BODY(seen.append), 5, 3, 0)
    assert (seen, ALONE["omp_get_thread_num"](), ALONE["omp_get_num_threads"]()) == ([5], 0, 1)


EVERY_LOOP = """
import hashlib
import torch
from hrm_megatron.layers import on_cpu
draw = torch.Generator().manual_seed(1)
x, grad, two = (torch.randn(128, width, generator=draw) for width in (100, 100, 200))  # no multiple of a vector
factors = torch.empty(128, 1)
y = on_cpu.norm_in_loops(x, 1e-6, factors)
for name, found in dict(
        norm=[y, factors], norm_gradient=[on_cpu.norm_gradient_in_loops(grad, y, factors)],
        gated=[on_cpu.gated_in_loops(x, grad)], gated_gradients=on_cpu.gated_gradients_in_loops(grad, x, y),
        swiglu=[on_cpu.swiglu_in_loops(two)], swiglu_gradient=[on_cpu.swiglu_gradient_in_loops(grad, two)]).items():
    print(name, *(hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in found))
"""


def test_loops_compute_the_same_where_they_are_compiled_and_where_they_are_loaded(tmp_path):
    """Otherwise a run would not be resumed bitwise by the first process behind an installation, or by a later one."""
    compiled, loaded = (subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EVERY_LOOP], capture_output=True, text=True, check=True,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}).stdout.splitlines() for _ in range(2))
    assert any(tmp_path.rglob("*.nbc")) and len(compiled) == 6 and compiled == loaded
