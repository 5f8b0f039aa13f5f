"""Forty steps of HRM-Text's own training loop, repeated by ours through Megatron's DDP and distributed optimizer."""
import pytest
import torch

from hrm_megatron.convert.table import table
from hrm_megatron.optim.adam_atan2 import UPDATES
from hrm_megatron.optim.schedule import BPSchedule, LRSchedule
from tests.rounding import GRADIENTS, UNIT

STEPS = 40
LOSS_TOLERANCE = STEPS * 2 ** -21  # a unit in the last place of a loss near 6 for each step
# The update is nearly sign-like, so an error of any size in a gradient near zero would be as large as the rate, 1e-2.
WEIGHT_TOLERANCE = 2 * STEPS * UNIT  # the decayed weight and its sum with the update are rounded, and below 1
# Of the largest element. Both round each gradient; a mean of the last 10 or 20 rounds no more than the largest of them,
# and a square twice as much.
MOMENT_TOLERANCE = {"exp_avg": GRADIENTS, "exp_avg_sq": 2 * GRADIENTS}


@pytest.fixture(scope="module")
def run(golden_case, reference_model, reference_batch, trainer):
    """The trainer after all steps, with `losses`, `rates` and `counts` (of both groups) of each."""
    facts = golden_case("trajectory").facts
    config, arch, total_steps = facts["config"], facts["config"]["arch"], facts["total_steps"]
    model = reference_model(arch, golden_case("trajectory_init").tensors, facts["train_metadata"]["vocab_size"],
                            calculate_per_token_loss=True)
    run = trainer(
        model, LRSchedule(config["lr"], config["lr"] * config["lr_min_ratio"], config["lr_warmup_steps"], total_steps),
        config["weight_decay"], config["ema"], (config["beta1"], config["beta2"]))
    bp_schedule = BPSchedule(arch["bp_min_steps"], arch["bp_max_steps"], arch["bp_warmup_ratio"], total_steps)
    batches = golden_case("trajectory_batches").tensors
    run.losses, run.rates, run.counts = [], [], []
    for step in range(1, STEPS + 1):
        run.losses.append(run.step([reference_batch(batches, f"s{step:02d}.")], bp_schedule.at(step)))
        run.rates.append({group["lr"] for group in run.groups()})
        run.counts.append([group[UPDATES] for group in run.groups()])
    return run


@pytest.fixture(scope="module")
def steps(golden_case):
    steps = golden_case("trajectory").facts["steps"]
    assert [each["step"] for each in steps] == list(range(1, STEPS + 1))
    return steps


def test_the_loss_of_every_step_equals_the_reference(run, steps):
    for loss, want in zip(run.losses, steps, strict=True):
        assert loss == pytest.approx(want["loss_sum"] / want["count"], abs=LOSS_TOLERANCE), want["step"]


def test_every_step_uses_the_reference_rate(run, steps):
    assert run.rates == [{each["lr"]} for each in steps]


def test_updates_are_counted_apart_for_the_embedding(run, steps):
    assert run.counts == [[each["param_steps"]["lm_head.weight"], each["param_steps"]["embed_tokens.embedding_weight"]]
                          for each in steps]
    assert run.counts[-1] == [40, 30]  # 10 steps had too few gradient ticks to reach the embedding


@pytest.mark.parametrize(("part", "tolerance"), [("param", WEIGHT_TOLERANCE), ("ema", WEIGHT_TOLERANCE),
                                                 *MOMENT_TOLERANCE.items()])
def test_the_last_state_equals_the_reference(run, golden_case, part, tolerance):
    have, want = run.state(), golden_case("trajectory_step40").tensors
    trained = [entry for entry in table(run.model.config.arch) if entry.trained]
    assert len(trained) == 2 * 4 + 2
    for entry in trained:
        theirs = want[f"{part}.{entry.native}"]
        scale = theirs.abs().max() if part.startswith("exp_avg") else 1
        error = (entry.from_megatron(have[f"{part}.{entry.megatron}"].view(entry.shape)) - theirs).abs().max() / scale
        assert error < tolerance, entry.native


def test_the_average_is_not_the_weight(run):
    # Guards the claim above: both have one tolerance, so they must be further apart than it.
    state = run.state()
    assert (state["param.output_layer.weight"] - state["ema.output_layer.weight"]).abs().max() > 1000 * WEIGHT_TOLERANCE


def test_the_model_holds_the_masters(run):
    state = run.state()
    for name, weight in run.model.named_parameters():
        assert torch.equal(weight.detach().flatten(), state[f"param.{name}"].flatten()), name
