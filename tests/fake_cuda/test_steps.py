"""Whole steps through the branches that only a GPU takes, with dynamo on: on a device that computes nothing.

What is held: everything traces and nothing falls back to eager, with as many graphs as there are functions; the host
waits for the device where it must and nowhere else; collectives start during backward; and what keeps autograd from
adding up gradients that are in the buffer already. See device.py.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILED, OVERLAP = dict(compile_layers=True), dict(overlap=True)
CASES = [COMPILED | OVERLAP | dict(recompute_ticks=2), OVERLAP]
SLOW = [COMPILED | OVERLAP, COMPILED, {}, OVERLAP | dict(recompute_ticks=2),
        OVERLAP | dict(recompute_gated_act=True), dict(attention_kernel="sdpa"), OVERLAP | dict(context_parallel=2),
        COMPILED | OVERLAP | dict(context_parallel=2), OVERLAP | dict(recompute_gated_act=True, context_parallel=2)]
TENSOR_PARALLEL = OVERLAP | dict(tensor_parallel=2)
WEIGHTS, MICROBATCHES = 2 * 2 * 4, 2  # stacks, layers, linear layers of each
BP_STEPS, TICKS, LAYERS = (5, 5, 2), 8, 2


def run(cases):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.fake_cuda.probe", *map(json.dumps, cases)],
                          cwd=ROOT, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(request):
    """What the probe says of each case, from one process for all that were selected."""
    chosen = {json.dumps(item.callspec.params["case"]): item.callspec.params["case"] for item in request.session.items
              if item.path == Path(__file__) and "case" in getattr(getattr(item, "callspec", None), "params", {})}
    return run(chosen.values())


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
                         ids=lambda case: " ".join(case) or "plain")
def test_steps_on_a_gpu(found, case):
    steps = found[json.dumps(case)]
    print(json.dumps(steps))
    # Of the first step, whose second micro-batch compiles nothing. Fewer gradient ticks begin at another layer.
    compiled, of_backward = steps["graphs"][0]
    assert steps["graphs"][1] == [compiled, of_backward] and compiled <= (12 if case.get("compile_layers") else 18)
    assert steps["graphs"][2][0] <= compiled + 4 and of_backward <= steps["graphs"][2][1] <= of_backward + 2
    # Before gradients are finalized nothing; then their check and the norm for the log.
    assert steps["reads"] == [[0, 2]] * 3
    # The first step of a number of ticks counts gradients, the next one reduces each bucket as it fills.
    groups = steps["groups"] if case.get("overlap") else 0
    assert (groups > 4) == ("overlap" in case)
    # Under context parallelism keys and values are gathered in each forward and their gradients reduced in backward.
    forward, backwards = ((TICKS * LAYERS, [bp * LAYERS for bp in BP_STEPS]) if "context_parallel" in case
                          else (0, [0] * 3))
    assert steps["reduced"] == [backwards[0], groups + backwards[1], backwards[2]]
    assert steps["gathered"] == [groups + 2 * forward + backward for backward in backwards]  # as they are needed
    # A weight's gradient is answered once in a backward and takes no memory. Ticks that run again have their own.
    backwards_of_a_weight = 2 + 2 + 1 if case.get("recompute_ticks") else 3
    assert steps["results"] == {"_efficientzerotensor.default": WEIGHTS * MICROBATCHES * backwards_of_a_weight}


@pytest.mark.slow
@pytest.mark.parametrize("case", [TENSOR_PARALLEL, TENSOR_PARALLEL | dict(recompute_ticks=2)], ids=" ".join)
def test_steps_on_gpus_with_tensor_parallelism(found, case):
    """Stock layers send more, and answer with memory that nothing is written to: no more waits and no more graphs."""
    steps = found[json.dumps(case)]
    compiled, of_backward = steps["graphs"][0]
    assert steps["graphs"][1] == [compiled, of_backward] and compiled <= 18 and steps["graphs"][2][0] <= compiled + 4
    assert steps["reads"] == [[0, 2]] * 3
    backwards_of_a_weight = 2 + 2 + 1 if case.get("recompute_ticks") else 3
    assert steps["results"].pop("_efficientzerotensor.default") == WEIGHTS * MICROBATCHES * backwards_of_a_weight
    assert steps["results"].keys() <= {"empty.memory_format"}
