"""AdamATan2 inside Megatron: its groups, its gradients, its state on disk, and the schedule that drives it."""
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from hrm_megatron.config import Architecture
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.optim.adam_atan2 import UPDATES
from hrm_megatron.optim.schedule import LRSchedule

ARCHITECTURE = Architecture(2, 24, 3, 40, 250, h_cycles=2, l_cycles=2)
SCHEDULE = LRSchedule(0.01, 0.001, warmup_steps=3, total_steps=11)


def batch(seed, *pairs, row_tokens=23):
    generator = torch.Generator().manual_seed(seed)
    examples = [tuple(torch.randint(1, 250, (n,), generator=generator).numpy() for n in (p, r + 1)) for p, r in pairs]
    return PackedBatch.from_rows({name: t[None] for name, t in assemble_row(examples, row_tokens).items()})


@pytest.fixture
def build(trainer):
    def build(seed=5, schedule=SCHEDULE, **settings):
        from hrm_megatron.model.hrm import HRMModel
        from hrm_megatron.transformer_config import hrm_config

        return trainer(HRMModel(hrm_config(ARCHITECTURE, calculate_per_token_loss=True), seed), schedule, **settings)
    return build


def test_the_embedding_alone_has_its_own_group(build):
    run = build()
    layers, embedding = run.groups()
    assert [sum(p.numel() for p in group["params"]) for group in (layers, embedding)] \
        == [sum(p.numel() for name, p in run.model.named_parameters() if ("embedding" in name) == inside)
            for inside in (False, True)]
    assert embedding["is_embedding"] and not layers.get("is_embedding")
    assert layers["weight_decay"] == embedding["weight_decay"] == 0.1


def test_the_embedding_waits_while_few_ticks_have_gradient(build):
    run = build()
    before = run.model.embedding.word_embeddings.weight.detach().clone()
    counts = []
    for step, bp_steps in enumerate([2, 2, 3, 2, 4]):  # h_cycles is 2
        run.step([batch(step, (5, 3), (4, 7))], bp_steps)
        counts.append([group[UPDATES] for group in run.groups()])
        moved = not torch.equal(run.model.embedding.word_embeddings.weight.detach(), before)
        assert moved == (step >= 2)
    assert counts == [[1, 0], [2, 0], [3, 1], [4, 1], [5, 2]]


def test_unequal_micro_batches_give_the_mean_over_all_labels(build):
    run = build()
    parts = [batch(1, (5, 3)), batch(2, (4, 7), (2, 5))]  # 4 and 14 labels
    plain = build().model
    scores = [plain(batch=each, bp_steps=4)[0] for each in parts]
    assert [len(losses) for losses in scores] == [4, 14]
    mean = torch.cat(scores).mean()
    gradients = dict(zip((name for name, _ in plain.named_parameters()),
                         torch.autograd.grad(mean, list(plain.parameters())), strict=True))
    assert run.step(parts, 4) == pytest.approx(mean.item(), rel=1e-6)
    state = run.state()
    for name, gradient in gradients.items():
        have = state[f"exp_avg.{name}"].view_as(gradient)
        assert (have - 0.1 * gradient).abs().max() <= 2e-6 * gradient.abs().max(), name


def test_everything_survives_a_checkpoint_and_the_command_line_wins(build, tmp_path):
    from megatron.core import dist_checkpointing

    first = build(ema_decay=0.5)
    for step, bp_steps in enumerate([2, 4, 4]):
        first.step([batch(step, (5, 3), (4, 7))], bp_steps)
    dist_checkpointing.save(first.sharded(), str(tmp_path))
    want = {name: tensor.clone() for name, tensor in first.state().items()}
    assert {name.split(".")[0] for name in want} == {"param", "exp_avg", "exp_avg_sq", "ema"}

    other = build(seed=6, schedule=LRSchedule(0.5, 0.5, 0, 11), weight_decay=0.3, ema_decay=0.25, betas=(0.8, 0.9))
    other.step([batch(9, (5, 3))], 4)
    loaded = dist_checkpointing.load(other.sharded(is_loading=True), str(tmp_path))
    other.model.load_state_dict(loaded["model"])
    other.optimizer.load_state_dict(loaded["optimizer"])
    have = other.state()
    assert have.keys() == want.keys() and all(torch.equal(have[name], want[name]) for name in want)
    assert [group[UPDATES] for group in other.groups()] == [3, 2]
    for group in other.groups():
        assert (group["lr"], group["weight_decay"], group["ema_decay"], group["betas"]) == (0.5, 0.3, 0.25, (0.8, 0.9))

    same = build(seed=7, ema_decay=0.5)
    loaded = dist_checkpointing.load(same.sharded(is_loading=True), str(tmp_path))
    same.model.load_state_dict(loaded["model"])
    same.optimizer.load_state_dict(loaded["optimizer"])
    same.now.step = first.now.step
    losses = [run.step([batch(4, (5, 3), (4, 7))], 4) for run in (first, same)]
    assert losses[0] == losses[1]
    have, want = same.state(), first.state()
    assert all(torch.equal(have[name], want[name]) for name in want)


def test_a_rank_that_owns_no_weight_takes_part_in_a_load(build, monkeypatch):
    """Megatron's loader drops the empty dict that such a rank asks for; the others would wait for it."""
    run, taken = build(), []
    run.step([batch(0, (5, 3))], 4)
    (optimizer,) = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    loaded = {name: value for name, value in run.sharded()["optimizer"].items() if name != "param_state"}
    monkeypatch.setattr(optimizer, "load_parameter_state_from_fully_reshardable", taken.append)
    run.optimizer.load_state_dict(loaded)
    assert taken == [{}]


def test_a_checkpoint_of_another_optimizer_is_refused(build, tmp_path):
    from megatron.core import dist_checkpointing

    run = build()
    run.step([batch(0, (5, 3))], 4)
    state = run.sharded()
    for parts in state["optimizer"]["param_state"].values():
        del parts["ema"]
    dist_checkpointing.save(state, str(tmp_path))
    with pytest.raises(CheckpointException, match="optimizer.state.ema.* not in state dict"):
        dist_checkpointing.load(build().sharded(is_loading=True), str(tmp_path))


def test_the_norm_of_gradients_is_megatrons(single_rank):
    from megatron.core.utils import local_multi_tensor_l2_norm

    from hrm_megatron.optim.builder import l2_norm

    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(shape, generator=generator) * 10.0**i for i, shape in enumerate([(3, 5), (7,), (1,)])]
    norms = [norm(2048, None, [gradients], False)[0] for norm in (l2_norm, local_multi_tensor_l2_norm)]
    assert norms[0].shape == (1,)
    torch.testing.assert_close(*norms, rtol=3e-7, atol=0)  # two roundings to 24 bits


def test_megatron_has_its_own_names_back(build):
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from hrm_megatron.optim.builder import EMADistributedOptimizer

    before = megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER
    run = build()
    assert (megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER) == before
    assert megatron_optimizer.DistributedOptimizer is DistributedOptimizer
    (part,) = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    assert isinstance(part, EMADistributedOptimizer)


@pytest.fixture
def schedule(single_rank):
    """A scheduler of 6 rows per step over two groups of an optimizer, and `now`, whose `step` is the one that runs."""
    from hrm_megatron.optim.adam_atan2 import AdamATan2
    from hrm_megatron.optim.builder import StepScheduler

    def make(schedule=SCHEDULE, weight_decay=0.1, rows_per_step=6):
        now = SimpleNamespace(step=1)
        inner = AdamATan2([dict(params=[torch.ones(2, requires_grad=True)]),
                           dict(params=[torch.ones(3, requires_grad=True)], wd_mult=1.0)], lr=9.0)
        optimizer = SimpleNamespace(param_groups=inner.param_groups, optimizer=inner)
        scheduler = StepScheduler(optimizer, schedule, rows_per_step, weight_decay, lambda: now.step)
        return SimpleNamespace(scheduler=scheduler, optimizer=inner, groups=inner.param_groups, now=now)
    return make


def test_a_step_is_made_and_logged_at_its_own_rate(schedule):
    run = schedule()
    used = []
    run.optimizer.update = lambda *_, rate, **__: used.append(rate)
    for p in (group["params"][0] for group in run.groups):
        p.grad = torch.ones_like(p)
    for step in range(1, 14):
        run.now.step = step
        run.optimizer.step()
        run.scheduler.step(6)  # as the loop does before it logs
        assert [(group["lr"], group["weight_decay"]) for group in run.groups] == [(SCHEDULE.at(step), 0.1)] * 2
        assert used[-2:] == [SCHEDULE.at(step) / (1 - 0.9 ** step)] * 2


def test_the_running_step_is_the_only_clock(schedule):
    first, second = schedule(), schedule(rows_per_step=4)
    first.now.step = 7
    first.scheduler.step(6)
    state = first.scheduler.state_dict()
    assert state["num_steps"] == 7 * 6 and state["lr_decay_steps"] == 11 * 6  # in Megatron's unit, rows
    second.now.step = 8  # whatever the checkpoint says in rows, and with other rows per step
    second.scheduler.load_state_dict(state)
    second.optimizer.step()
    assert [group["lr"] for group in second.groups] == [SCHEDULE.at(8)] * 2
