"""The sharded step of real runs: as few updates as groups, and bitwise the numbers of one for each parameter."""
import json

import pytest
import torch

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.checkpoint.fsdp_folder import open_run
from tests.training.conftest import curves
from tests.training.test_gradients import ROWS
from tests.training.test_layouts import OVERLAP

pytestmark = pytest.mark.ranks
RUN = [*ROWS, "--train-iters", 5, "--lr", 4e-3, "--min-lr", 4e-3, "--lr-warmup-iters", 1, "--bp-warmup-fraction", 1,
       "--bp-max-steps", 4, "--global-batch-size", 4, "--micro-batch-size", 1]
# Repeats every step of a rank on copies, parameter by parameter. Writes how many steps gave the same numbers, and of
# the last one how many elements each update took and each group owns, and in how many buckets.
WATCH = """
import json, math, os, torch
from hrm_megatron.optim import adam_atan2, sharded
from hrm_megatron.optim.adam_atan2 import STATE_KEYS, UPDATES, AdamATan2
stock, build, equal = AdamATan2.step, sharded.EMADistributedOptimizer.__init__, []

def tensors(self, p):
    return p.detach(), *(self.init_state(p)[key] for key in STATE_KEYS)

def init(self, *arguments, **options):
    build(self, *arguments, **options)
    inner, update = self.optimizer, self.optimizer.update
    inner.calls, inner.buckets = [], sum(len(buffer.buckets) for buffer in self.buffers)
    inner.update = lambda *given, **factors: (inner.calls.append(given[0].numel()), update(*given, **factors))

def step(self, *arguments):
    self.calls.clear()
    groups = [(group, group[UPDATES], [[t.clone() for t in tensors(self, p)] for p in group["params"]])
              for group in self.param_groups]
    stock(self, *arguments)
    same = True
    for group, updates, copies in groups:
        t, lr, (b1, b2) = group[UPDATES], group["lr"], group["betas"]
        for p, (master, *state) in zip(group["params"], copies):
            if t > updates:
                adam_atan2.update(master, p.grad, *state, keep=1 - lr * group["weight_decay"], b1=b1, b2=b2, rate=lr / (
                    1 - b1 ** t), correction=math.sqrt(1 - b2 ** t), ema_decay=group["ema_decay"])
            same &= all(map(torch.equal, tensors(self, p), (master, *state)))
    equal.append(same)
    with open(PLACE + os.environ["RANK"], "w") as file:
        json.dump(dict(equal=equal, calls=self.calls, buckets=self.buckets, parameters=len(self.state),
                       groups=[sum(p.numel() for p in group["params"]) for group in self.param_groups]), file)

sharded.EMADistributedOptimizer.__init__, AdamATan2.step = init, step
"""
SMALL_BUCKETS = [*OVERLAP, "--ddp-bucket-size", 20_000]
CASES = {"bf16, overlap": ["--bf16", *SMALL_BUCKETS], "bf16": ["--bf16"], "fp32, overlap": SMALL_BUCKETS, "fp32": []}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "bf16, overlap" else pytest.mark.slow)
                                  for name in CASES])
def test_a_shard_is_one_update_for_each_group(launch, tmp_path, name):
    def train(folder, *flags):
        run = launch(*RUN, "--save", tmp_path / folder, *CASES[name], "--log-hrm-norms", "--tensorboard-dir",
                     tmp_path / folder / "log", *flags, ranks=2,
                     prelude=f"PLACE = {str(tmp_path / 'rank')!r}\n{WATCH}")
        assert run.code == 0, run.output[-5000:]
        ranks = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
        for rank in ranks:
            groups = sum(size > 0 for size in rank["groups"])
            assert rank["parameters"] > 3 * groups and sum(rank["calls"]) >= sum(rank["groups"])
            if name == "fp32, overlap":  # in DDP's own buffers
                assert groups < len(rank["calls"]) <= rank["buckets"] + 1 < rank["parameters"]
            else:
                assert len(rank["calls"]) == groups and ("overlap" in name) == (rank["buckets"] > 1)
        return [rank["equal"] for rank in ranks]

    def state(folder, step=None):
        stored = open_run(find_iteration(tmp_path / folder, step))
        return {key: stored.tensor(key) for key in stored.shapes()}
    assert train("whole", "--save-interval", 2) == [[True] * 5] * 2
    assert train("resumed", "--load", tmp_path / "whole", "--ckpt-step", 2) == [[True] * 3] * 2
    want, have = state("whole"), state("resumed")
    assert have.keys() == want.keys() and all(torch.equal(have[key], want[key]) for key in want)
    masters = [key for key in want if key.startswith("optimizer.state.param.")]
    before = state("whole", 4)
    change, weights = (torch.cat([t.flatten().double() for t in tensors]).norm().item() for tensors in (
        [want[key].double() - before[key].double() for key in masters], [want[key] for key in masters]))
    for folder in ("whole", "resumed"):
        # Read off the moments: what rounding the new weights loses is 2^-24 of them, and a step at 4e-3 a hundredth.
        logged = curves(tmp_path / folder / "log")
        assert logged["update/norm"][5] == pytest.approx(change, rel=1e-5)
        assert logged["update/relative to weights"][5] == pytest.approx(change / weights, rel=1e-5)
    assert len(masters) == 2 * 4 * 4 + 2
    for key in masters:
        weight = want[key.removeprefix("optimizer.state.param.")]
        assert torch.equal(weight, want[key].to(weight.dtype)), key
