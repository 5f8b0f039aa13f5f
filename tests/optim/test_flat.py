"""Updates of many weights by one call: which lie side by side, and that the numbers are those of one call for each."""
import pytest
import torch

from hrm_megatron.config import Architecture
from hrm_megatron.optim import flat
from hrm_megatron.optim.adam_atan2 import STATE_KEYS, UPDATES, AdamATan2
from hrm_megatron.optim.flat import FlatState, Shard, joined, starts_of
from hrm_megatron.optim.schedule import LRSchedule
from tests.optim.test_builder import batch


def test_shards_keep_the_distances_of_their_bucket():
    shards = [Shard(0, 40, 64), Shard(0, 64, 74), Shard(0, 128, 200), Shard(1, 200, 203), Shard(1, 512, 520)]
    assert starts_of(shards) == ([0, 24, 88, 192, 256], 264)  # a new bucket, or a gap of more than padding, begins anew
    assert starts_of([]) == ([], 0)


def test_padding_is_megatrons(single_rank):
    from megatron.core.optimizer.param_layout import pad_param_start

    assert [pad_param_start(end) for end in (1, flat.PADDING, flat.PADDING + 1)] == [64, 64, 128]


def test_a_state_moves_to_its_place_and_again_when_it_is_replaced():
    state, home = dict(m=torch.arange(6.0).view(2, 3), v=torch.ones(2, 3)), FlatState(10)
    home.take(state, 4)
    assert home.parts["m"].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5] and state["m"].shape == (2, 3)
    kept = state["v"]
    state["m"] = torch.full((2, 3), 7.0)
    home.take(state, 4)
    assert home.parts["m"][4:].tolist() == [7] * 6 and state["v"] is kept
    state["m"].zero_()
    assert not home.parts["m"].any()


def rows(places, sizes, gradients_at=None):
    """Rows of (master, moment, gradient) that begin at these elements of a buffer each."""
    buffers = [torch.arange(400.0) + 1000 * i for i in range(3)]
    return [(*(buffer[start:start + size] for buffer in buffers[:2]), buffers[2][at:at + size])
            for start, size, at in zip(places, sizes, gradients_at or places, strict=True)]


def test_rows_that_lie_side_by_side_are_one():
    together, alone = joined(rows([8, 64, 200], [40, 10, 5]))  # padding of 16, and a gap of 126
    assert [t.tolist() for t in together] == [[*range(start + 8, start + 74)] for start in (0, 1000, 2000)]
    assert alone[0].tolist() == [200, 201, 202, 203, 204]
    together[0].zero_()
    given = rows([0, 64], [64, 9])
    for t in next(joined(given)):
        t.mul_(-1)
    assert given[1][2][0] == -2064  # in place


def test_what_stands_apart_is_apart():
    first, silent, last = rows([0, 8, 16], [8, 8, 8])
    assert len([*joined([first, silent, last])]) == 1 and len([*joined([first, None, last])]) == 2
    assert [*joined([None])] == [*joined([])] == []
    moved = (first[0], rows([8], [8])[0][1], first[2])  # of the same numbers in another buffer
    assert len([*joined([moved, silent])]) == 2
    shifted = (silent[0], rows([9], [8])[0][1], silent[2])
    assert len([*joined([first, shifted])]) == 2
    assert len([*joined([last, first])]) == 2  # backwards


@pytest.mark.parametrize("large, sizes", [(1 << 24, [33]), (31, [33]), (30, [30, 3]), (10, [30, 3])])
def test_gradients_of_several_buckets_are_copied_unless_a_call_is_large(monkeypatch, large, sizes):
    monkeypatch.setattr(flat, "LARGE", large)
    found = [*joined(rows([0, 16, 30], [12, 14, 3], [100, 116, 300]))]
    assert [len(master) for master, *_ in found] == sizes
    for master, moment, gradient in found:
        assert len(master) == len(moment) == len(gradient)
    whole = torch.cat([gradient for *_, gradient in found]).tolist()
    assert whole[:12] == [*range(2100, 2112)] and whole[16:30] == [*range(2116, 2130)]
    assert whole[30:] == [2300, 2301, 2302]


def test_a_large_weight_is_not_copied(monkeypatch):
    monkeypatch.setattr(flat, "LARGE", 14)
    given = rows([0, 16, 30], [12, 14, 3], [100, 200, 214])
    first, others = joined(given)
    assert len(first[0]) == 12 and len(others[0]) == 17 and others[2].data_ptr() == given[1][2].data_ptr()


# 44 x 24 is no multiple of 64, so DDP pads behind it. All are multiples of 32: torch's kernels on a CPU have scalar
# functions of their own, with other roundings, for what is left of a call behind the last 32 elements.
PADDED = Architecture(2, 24, 3, 44, 250, h_cycles=2, l_cycles=2)
STEPS = [2, 2, 3, 2, 4]  # gradient ticks: the embedding is updated in the third and fifth


@pytest.fixture
def counted(trainer, monkeypatch):
    """Build a run, its updates by one call for each group or, as `apart`, for each parameter; `calls` counts them."""
    def build(apart, seed=5):
        from hrm_megatron.model.hrm import HRMModel
        from hrm_megatron.transformer_config import hrm_config

        with monkeypatch.context() as patched:
            if apart:
                patched.setattr(AdamATan2, "lay_out", lambda *_, **__: None)
            run = trainer(HRMModel(hrm_config(PADDED, calculate_per_token_loss=True), seed),
                          LRSchedule(0.01, 0.001, warmup_steps=3, total_steps=11))
        (part,) = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
        run.inner, run.calls = part.optimizer, []
        stock = run.inner.update
        run.inner.update = lambda *given, **factors: (run.calls.append(given[0].numel()), stock(*given, **factors))
        return run
    return build


def same_numbers(one, other):
    have, want = one.state(), other.state()
    return have.keys() == want.keys() and all(torch.equal(have[name], want[name]) for name in want)


def test_a_group_is_one_update_with_the_numbers_of_one_for_each_parameter(counted):
    one, each = counted(apart=False), counted(apart=True)
    for step, bp_steps in enumerate(STEPS):
        losses = []
        for run in (one, each):
            run.calls.clear()
            losses.append(run.step([batch(step, (5, 3), (4, 7))], bp_steps))
        embedding = bp_steps > 2  # h_cycles
        assert losses[0] == losses[1] and same_numbers(one, each)
        assert len(one.calls) == 1 + embedding and len(each.calls) == 2 * 4 * 2 + 1 + embedding
        assert sum(one.calls) > sum(each.calls)  # padding
    assert [group[UPDATES] for group in one.groups()] == [group[UPDATES] for group in each.groups()] == [5, 2]


def test_a_loaded_or_replaced_state_is_one_update_again(counted, tmp_path):
    from megatron.core import dist_checkpointing

    one, each = counted(apart=False), counted(apart=True)
    for step, bp_steps in enumerate(STEPS[:3]):
        each.step([batch(step, (5, 3), (4, 7))], bp_steps)
    dist_checkpointing.save(each.sharded(), str(tmp_path))
    loaded = dist_checkpointing.load(one.sharded(is_loading=True), str(tmp_path))
    one.model.load_state_dict(loaded["model"])
    one.optimizer.load_state_dict(loaded["optimizer"])
    one.now.step = each.now.step
    assert same_numbers(one, each)
    for bp_steps in (4, 2, 4):
        one.calls.clear()
        assert len({run.step([batch(bp_steps, (6, 2))], bp_steps) for run in (one, each)}) == 1
        assert len(one.calls) == 1 + (bp_steps > 2) and same_numbers(one, each)
        for state in one.inner.state.values():  # as a load by others would
            state.update({key: state[key].clone() for key in STATE_KEYS})
