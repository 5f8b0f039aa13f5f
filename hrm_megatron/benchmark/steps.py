"""Measure time and memory of training steps of small models in this process, to calibrate the planner."""
from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch._C._profiler import _EventType

from hrm_megatron.benchmark.record import device_name
from hrm_megatron.config import ConfigError
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.model.ticks import trains_embedding, unroll
from hrm_megatron.optim.builder import build_optimizer
from hrm_megatron.planner.calibration import Calibration, Case, Measured, fit
from hrm_megatron.training.metrics import loss_sums
from hrm_megatron.transformer_config import hrm_config

FITTED = (Case(1, 128, 2, 512, 1, 2), Case(2, 128, 2, 512, 2, 5), Case(1, 256, 4, 512, 2, 5),
          Case(2, 256, 4, 1024, 1, 2), Case(2, 384, 6, 512, 1, 5), Case(1, 384, 6, 512, 2, 2),
          Case(3, 512, 8, 512, 1, 2), Case(1, 512, 8, 1024, 1, 5), Case(1, 320, 5, 1024, 2, 3),
          Case(1, 192, 3, 512, 1, 4))
HELD_OUT = (Case(2, 192, 3, 512, 1, 3), Case(1, 256, 4, 1024, 2, 4), Case(3, 256, 4, 512, 1, 5),
            Case(2, 320, 5, 1024, 1, 2), Case(1, 448, 7, 512, 2, 3), Case(2, 512, 8, 768, 1, 4))
PROFILES = 20  # attempts: on a busy machine about one in four fails


def micro_batch(case: Case) -> PackedBatch:
    """Return rows of random tokens, filled with examples of the lengths in `case`."""
    rng, (prefix, response) = np.random.default_rng(0), case.example
    examples = [(rng.integers(1, case.vocab_size, prefix), rng.integers(1, case.vocab_size, response + 1))
                for _ in range(case.row_tokens // (prefix + response))]
    row = assemble_row(examples, case.row_tokens)
    batch = PackedBatch.from_rows({name: torch.stack([tensor] * case.rows) for name, tensor in row.items()})
    return batch.to(f"cuda:{torch.cuda.current_device()}")


def training_step(case: Case, dtype: torch.dtype) -> Callable[[], None]:
    """Build a model with Megatron's DDP buffers and our optimizer; return a function that takes one step."""
    narrow = dtype == torch.bfloat16
    config = hrm_config(case.architecture, gradient_accumulation_fusion=True, calculate_per_token_loss=True,
                        bf16=narrow, params_dtype=dtype)
    model = HRMModel(config, 1).train()
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True), model)
    optimizer = build_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-4, min_lr=1e-4, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95,
                        clip_grad=0.0, bf16=narrow, params_dtype=dtype, use_distributed_optimizer=True),
        [ddp], 0.9999, lambda: trains_embedding(unroll(2, 3, case.bp_steps)))

    def step() -> None:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        batch = micro_batch(case)
        loss, *_ = loss_sums(batch, ddp(batch=batch, bp_steps=case.bp_steps), None)
        loss.backward()
        ddp.finish_grad_sync()
        optimizer.step()
    return step


def peak_bytes(case: Case, dtype: torch.dtype) -> int:
    """Return the peak bytes of torch's allocator from building a model to the end of its second step."""
    gc.collect()  # else the previous model might be freed while measuring
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        _steps(training_step(case, dtype), 2)
        return torch.cuda.max_memory_allocated()
    for _ in range(PROFILES):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            _steps(training_step(case, dtype), 2)
            gc.collect()
        assert profile.profiler and profile.profiler.kineto_results
        changes = allocations(profile.profiler.kineto_results.experimental_event_tree())
        if (most := most_held(changes)) is not None:
            return most
    raise ConfigError(f"{case}: torch's profiler lost events {PROFILES} times; measure where less else runs")


def allocations(events: Iterable[Any]) -> list[tuple[int, int]]:
    """Return (time, bytes) of the allocations in a profile; bytes are negative when freed."""
    found, waiting = [], [*events]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return found


def most_held(changes: Iterable[tuple[int, int]]) -> int | None:
    """Return the peak of the bytes held, from (time, bytes) changes; None if they do not sum to 0: torch's profiler
    sometimes loses an event, and the first profile includes allocations that are cached for later."""
    *held, left = itertools.accumulate((num_bytes for _, num_bytes in sorted(changes)), initial=0)
    return None if left else max(held, default=0)


def _steps(step: Callable[[], None], count: int) -> None:
    for _ in range(count):
        step()


def step_seconds(cases: Sequence[Case], dtype: torch.dtype, rounds: int) -> list[float]:
    """Return the median seconds of a step of each case: wall time on a GPU; CPU time of this process on a CPU, which
    other load affects less.

    Each round takes one step of each case, so that drifting machine speed affects all equally.
    """
    steps = [training_step(case, dtype) for case in cases]
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    taken: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds + 1):  # the first warms up
        for step, seconds in zip(steps, taken, strict=True):
            torch.cuda.synchronize()
            start = clock()
            step()
            torch.cuda.synchronize()
            seconds.append(clock() - start)
    return [statistics.median(seconds[1:]) for seconds in taken]


def calibrate(dtype: torch.dtype, rounds: int, source: str, fitted: Sequence[Case] = FITTED,
              held_out: Sequence[Case] = HELD_OUT) -> Calibration:
    """Measure steps on this device, in fp32 or bf16, and fit speeds to the `fitted` cases."""
    on_cpu, cases = not torch.cuda.is_available(), [*fitted, *held_out]
    peaks = [peak_bytes(case, dtype) for case in cases]
    found = [Measured(*one) for one in zip(cases, step_seconds(cases, dtype, rounds), peaks, strict=True)]
    steps, others = tuple(found[:len(fitted)]), tuple(found[len(fitted):])
    return Calibration(device_name(), dtype.itemsize, on_cpu, fit(steps, dtype.itemsize, not on_cpu, source), steps,
                       others)


def table(found: Calibration) -> Iterator[str]:
    """Yield prediction against measurement, a line per step; then the largest errors of the steps that were not
    fitted."""
    yield (f"{'layers, hidden, row, rows, bp':30} {'measured':>9} {'predicted':>9} {'':>7} {'measured':>9} "
           f"{'predicted':>9}")
    furthest = [0.0, 0.0]
    for kind, steps in (("fitted", found.fitted), ("not fitted", found.held_out)):
        for one in steps:
            case, seconds, size = one.case, found.step(one.case).seconds, found.memory(one.case).total
            off = [seconds / one.seconds - 1, size / one.peak_bytes - 1]
            if kind == "not fitted":
                furthest = [max(a, abs(b)) for a, b in zip(furthest, off, strict=True)]
            name = f"{case.num_layers}, {case.hidden_size}, {case.row_tokens}, {case.rows}, {case.bp_steps} {kind}"
            yield (f"{name:30} {one.seconds:7.3f} s {seconds:7.3f} s {off[0]:+7.1%} {one.peak_bytes / 1e6:6.1f} MB "
                   f"{size / 1e6:6.1f} MB {off[1]:+7.1%}")
    yield f"furthest of those not fitted: time {furthest[0]:.1%}, memory {furthest[1]:.1%}"
