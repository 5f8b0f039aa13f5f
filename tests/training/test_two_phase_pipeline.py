"""What the real pipeline does, against the simulation: every operation in order, the graphs and states alive, the time.
"""
import json

import pytest

from hrm_megatron.model.ticks import states_between, unroll
from hrm_megatron.parallel.simulate import Operation, interleaved, stock, two_phase, two_phase_orders
from hrm_megatron.parallel.stages import microbatch_group, microbatch_windows
from tests.training.test_gradients import ROWS
from tests.training.test_layouts import PP

pytestmark = pytest.mark.ranks
# Watches a rank: what it runs, by tick and micro-batch, how many graphs of stacks are alive at most, and how many
# states when a first phase ends and at each visit of its last tick.
WATCH = """
import collections, gc, json, os, time, torch
from megatron.core.transformer.transformer_block import TransformerBlock
from hrm_megatron.model.pipeline import PipelinedHRM
from hrm_megatron.training import two_phase_pipeline as schedule
seen, log, alive, most, held, sending = collections.Counter(), [], [0], [0], [], []
stock_tick = PipelinedHRM.run_tick

class Graph:
    def __init__(self):
        alive[0] += 1
        most[0] = max(most[0], alive[0])
    def __del__(self):
        alive[0] -= 1

class Visit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        if ctx.needs_input_grad[0]:
            ctx.graph = Graph()
        time.sleep(SECONDS)
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * SECONDS)
        return grad

def visit(x):  # with a graph also where no state before has one
    return Visit.apply(x.detach().requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x)

def states():
    shape = 64 // SHARDS, 1, 48
    return len({t.data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == shape})

def run_tick(self, index, *rest):
    if not SECONDS and index == self.second_phase - 1:
        sending.append(states())
    if not SECONDS and index == self.second_phase > 0 and not seen[index]:
        gc.collect()
        held.append(states())
    out = stock_tick(self, index, *rest)
    m = seen[index]
    seen[index] += 1
    log.append((False, m, index))
    if out.requires_grad:
        out.register_hook(lambda grad: log.append((True, m, index)))
    return out

def watched(*settings):
    run = make(*settings)
    def step(**options):
        seen.clear(), log.clear()
        torch.distributed.barrier()
        start = time.perf_counter()
        reports = run(**options)
        torch.distributed.barrier()
        seconds = time.perf_counter() - start
        with open(PLACE + os.environ["RANK"], "w") as file:
            json.dump(dict(log=log, most=most[0], left=alive[0], held=held, sending=sending,
                           seconds=seconds), file)
        return reports
    return step

make, schedule.two_phase_schedule, PipelinedHRM.run_tick = schedule.two_phase_schedule, watched, run_tick
stack = TransformerBlock.forward
if SECONDS:
    TransformerBlock.forward = lambda self, hidden_states, **_: visit(hidden_states)
else:
    TransformerBlock.forward = lambda self, hidden_states, **rest: stack(self, visit(hidden_states), **rest)
"""


@pytest.fixture
def watch(launch, tmp_path):
    """Run two steps through a pipeline: what each rank saw of the second. Stacks that take `seconds` only sleep."""
    def run(stages, microbatches, bp_steps, *flags, seconds=0.0, shards=1):
        prelude = f"PLACE, SECONDS = {str(tmp_path / 'rank')!r}, {seconds}\nSHARDS = {shards}\n{WATCH}"
        done = launch(*ROWS, PP, stages, "--global-batch-size", microbatches, "--micro-batch-size", 1, "--train-iters",
                      2, "--bp-min-steps", bp_steps, "--bp-max-steps", bp_steps, *flags, ranks=stages * shards,
                      prelude=prelude)
        assert done.code == 0, done.output[-5000:]
        return [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(stages * shards)]
    return run


@pytest.mark.parametrize("stages, microbatches, bp_steps, schedule, window", [
    (2, 6, 5, "stock", None),
    (4, 8, 3, "two-phase", None),
    (2, 9, 2, "two-phase", None),
    pytest.param(2, 5, 4, "stock", None, marks=pytest.mark.slow),
    pytest.param(4, 9, 2, "stock", None, marks=pytest.mark.slow),
    pytest.param(2, 7, 5, "two-phase", 3, marks=pytest.mark.slow),
    pytest.param(4, 4, 8, "two-phase", None, marks=pytest.mark.slow),  # no tick without gradient: one phase
])
def test_operations_are_the_simulated_ones_in_order(watch, parity, stages, microbatches, bp_steps, schedule, window):
    with_grad = [tick.with_grad for tick in unroll(2, 3, bp_steps)]
    ranks = watch(stages, microbatches, bp_steps, "--pipeline-schedule", schedule,
                  *(["--pipeline-window", window] if window else []))
    if schedule == "two-phase" and bp_steps < 8:
        orders = two_phase_orders(microbatch_windows(microbatches, stages, window), with_grad, stages)
        expected = two_phase(microbatches, with_grad, stages, window)
    else:
        orders = [interleaved(range(microbatches), range(8), stage, stages) for stage in range(stages)]
        expected = stock(microbatches, with_grad, stages)
    for rank, order in zip(ranks, orders, strict=True):
        assert [Operation(*operation) for operation in rank["log"]] == order
        assert rank["left"] == 0
    if orders[0][-1].tick:  # the second phase's first tick
        kept = states_between(unroll(2, 3, bp_steps), orders[0][-1].tick) * min(microbatches, window or microbatches)
        assert [rank["held"] for rank in ranks] == [[kept] * 2, *[[1] * 2] * (stages - 1)]  # 1: what a visit works on
        assert max(ranks[-1]["sending"]) <= stages + 1 < microbatches
    most = max(rank["most"] for rank in ranks)
    assert most == expected.live_graphs
    # A group is as many micro-batches as stages where these divide them.
    group = microbatch_group(min(microbatches, window or microbatches), stages)
    parity(f"PP {stages}, M {microbatches}, bp {bp_steps}, {schedule}: graphs alive", most, (bp_steps + 1) * group)


@pytest.mark.slow
@pytest.mark.parametrize("stages, microbatches", [(2, 16), (4, 16)])
def test_two_phases_save_the_time_that_the_simulation_says(watch, parity, stages, microbatches):
    """Stacks that sleep: a step is as long as its waiting makes it, on however few cores."""
    with_grad = [tick.with_grad for tick in unroll(2, 3, 2)]
    one, two = (watch(stages, microbatches, 2, "--pipeline-schedule", schedule, seconds=0.02)[0]["seconds"]
                for schedule in ("stock", "two-phase"))
    simulated = (1 - stock(microbatches, with_grad, stages).bubble) / (
        1 - two_phase(microbatches, with_grad, stages).bubble)
    assert simulated < 1
    parity(f"PP {stages}, M {microbatches}: two phases over one, {simulated:.3f} simulated", two / one, 1.0)
