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
        OVERLAP | dict(recompute_gated_act=True), dict(attention_kernel="sdpa")]
WEIGHTS, MICROBATCHES = 2 * 2 * 4, 2  # stacks, layers, linear layers of each


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
    forwards, backwards = steps["graphs"][0]
    assert steps["graphs"][1] == [forwards, backwards] and forwards <= (24 if case.get("compile_layers") else 18)
    assert steps["graphs"][2][0] <= forwards + 4 and backwards <= steps["graphs"][2][1] <= backwards + 2
    # Before gradients are finalized nothing; then their check and the norm for the log.
    assert steps["reads"] == [[0, 2]] * 3
    # The first step of a number of ticks counts gradients, the next one reduces each bucket as it fills.
    groups = steps["groups"] if case.get("overlap") else 0
    assert steps["reduced"] == [0, groups, 0] and (groups > 4) == ("overlap" in case)
    assert steps["gathered"] == [groups] * 3  # as they are needed
    # A weight's gradient is answered once in a backward and takes no memory. Ticks that run again have their own.
    backwards_of_a_weight = 2 + 2 + 1 if case.get("recompute_ticks") else 3
    assert steps["results"] == {"_efficientzerotensor.default": WEIGHTS * MICROBATCHES * backwards_of_a_weight}
