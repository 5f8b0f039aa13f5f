"""AdamATan2 against its formula, written out per element with Python's own numbers."""
import math

import pytest
import torch

from hrm_megatron.optim.adam_atan2 import ADAM_EPSILON, STATE_KEYS, UPDATES, AdamATan2, init_states, quotient_of


class Element:
    """One weight in double precision, after arXiv 2407.05872 as HRM-Text has it: decoupled decay, running average."""

    def __init__(self, value, lr, b1, b2, decay, ema_decay):
        self.p = self.ema = value
        self.m = self.v = 0.0
        self.t, self.lr, self.b1, self.b2, self.decay, self.ema_decay = 0, lr, b1, b2, decay, ema_decay

    def update(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g ** 2
        v_hat = self.v / (1 - self.b2 ** self.t)
        # HRM-Text divides the angle, not its first argument, by 1 - b1^t.
        direction = math.atan2(self.m, math.sqrt(v_hat)) / (1 - self.b1 ** self.t)
        self.p = (1 - self.lr * self.decay) * self.p - self.lr * direction
        self.ema = self.ema_decay * self.ema + (1 - self.ema_decay) * self.p


SETTINGS = {  # lr, b1, b2, decay, ema_decay
    "usual": (0.02, 0.9, 0.95, 0.1, 0.9),
    "no momentum": (0.3, 0.0, 0.5, 0.25, 0.4),
    "no decay": (0.05, 0.8, 0.99, 0.0, 0.75),
    "EMA is the weight": (0.05, 0.6, 0.7, 0.3, 0.0),
}


def random_tensor(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weight(seed, *shape, dtype=torch.float64):
    return torch.nn.Parameter(random_tensor(seed, *shape, dtype=dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", SETTINGS)
def test_seven_steps_equal_the_formula(name, dtype, tolerance):
    lr, b1, b2, decay, ema_decay = SETTINGS[name]
    p = weight(1, 3, 5, dtype=dtype)
    elements = [Element(value, lr, b1, b2, decay, ema_decay) for value in p.detach().double().flatten().tolist()]
    optimizer = AdamATan2([p], lr, (b1, b2), decay, ema_decay)
    for step in range(7):
        p.grad = random_tensor(10 + step, 3, 5, dtype=dtype) * 10.0 ** (step - 3)  # over seven orders of magnitude
        for element, g in zip(elements, p.grad.double().flatten().tolist(), strict=True):
            element.update(g)
        optimizer.step()
        state = optimizer.state[p]
        for have, attribute in ((p.detach(), "p"), (state["ema"], "ema"), (state["exp_avg"], "m"),
                                (state["exp_avg_sq"], "v")):
            want = torch.tensor([getattr(element, attribute) for element in elements], dtype=torch.float64).view(3, 5)
            assert (have.double() - want).abs().max() <= tolerance * want.abs().max(), (step, attribute)
    assert optimizer.param_groups[0][UPDATES] == 7


@pytest.mark.parametrize("name", SETTINGS)
def test_with_the_quotient_it_is_adamw(name):
    lr, b1, b2, decay, _ = SETTINGS[name]
    ours, theirs = weight(1, 3, 5), weight(1, 3, 5)
    mine = AdamATan2([ours], lr, (b1, b2), decay, direction=quotient_of)
    stock = torch.optim.AdamW([theirs], lr, (b1, b2), ADAM_EPSILON, decay)
    for step in range(7):
        ours.grad = random_tensor(10 + step, 3, 5) * 10.0 ** (step - 3)
        theirs.grad = ours.grad.clone()
        mine.step(), stock.step()
        assert (ours - theirs).abs().max() <= 1e-14 * theirs.abs().max(), step


def test_groups_keep_their_own_settings_and_counts():
    one, two = weight(1, 2, 3), weight(2, 4)
    settings = [(0.02, 0.9, 0.95, 0.1), (0.07, 0.5, 0.8, 0.4)]
    optimizer = AdamATan2([dict(params=[p], lr=lr, betas=(b1, b2), weight_decay=decay)
                           for p, (lr, b1, b2, decay) in zip((one, two), settings, strict=True)], 9.0, ema_decay=0.6)
    for p, (lr, b1, b2, decay) in zip((one, two), settings, strict=True):
        element = Element(p.detach().flatten()[1].item(), lr, b1, b2, decay, 0.6)
        p.grad = random_tensor(3, *p.shape)
        element.update(p.grad.flatten()[1].item())
        p.want = element.p
    optimizer.step()
    for p in (one, two):
        assert p.detach().flatten()[1].item() == pytest.approx(p.want, rel=1e-14)


def test_a_first_step_is_bounded_by_the_rate():
    # t = 1: m = (1 - b1) g and sqrt(v_hat) = |g|, so every element moves by lr/(1 - b1) * atan(1 - b1), whatever g is.
    p = weight(4, 6)
    before = p.detach().clone()
    p.grad = torch.tensor([1e-30, -1e-9, 0.3, -7.0, 1e12, -1e25], dtype=torch.float64)
    AdamATan2([p], 0.01, (0.9, 0.95), weight_decay=0.0).step()
    assert torch.allclose(before - p.detach(), p.grad.sign() * 0.01 / 0.1 * math.atan(0.1), rtol=1e-9)


def test_rows_without_gradient_do_nothing_but_decay():
    p = weight(5, 4, 3)
    before = p.detach().clone()
    optimizer = AdamATan2([p], 0.01, (0.9, 0.95), weight_decay=0.5, ema_decay=0.5)
    for _ in range(3):
        p.grad = random_tensor(6, 4, 3)
        p.grad[[0, 2]] = 0.0
        optimizer.step()
    assert torch.allclose(p.detach()[[0, 2]], before[[0, 2]] * (1 - 0.01 * 0.5) ** 3, rtol=1e-14, atol=0)
    assert (p.detach()[[1, 3]] / before[[1, 3]] - (1 - 0.01 * 0.5) ** 3).abs().min() > 1e-3


def test_a_skipped_group_keeps_everything():
    skipped, live = weight(7, 2, 3), weight(8, 3)
    optimizer = AdamATan2([dict(params=[skipped], name="skipped"), dict(params=[live], name="live")], 0.1,
                          ema_decay=0.5, has_gradient=lambda group: group["name"] == "live" or asked)
    asked, before = False, skipped.detach().clone()
    for _ in range(2):
        skipped.grad, live.grad = torch.full_like(skipped, 3.0), torch.full_like(live, 3.0)
        optimizer.step()
    state = optimizer.state[skipped]
    assert torch.equal(skipped.detach(), before) and torch.equal(state["ema"], before)
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    assert [group[UPDATES] for group in optimizer.param_groups] == [0, 2]
    asked = True
    optimizer.step()
    assert [group[UPDATES] for group in optimizer.param_groups] == [1, 3]
    element = Element(before[1, 2].item(), 0.1, 0.9, 0.95, 0.1, 0.5)
    element.update(3.0)  # its first update, with the bias corrections of a first one
    assert skipped.detach()[1, 2].item() == pytest.approx(element.p, rel=1e-14)


def test_a_parameter_without_gradient_keeps_everything_while_its_group_counts():
    silent, live = weight(9, 2, 3), weight(10, 3)
    before = silent.detach().clone()
    optimizer = AdamATan2([silent, live], 0.1, weight_decay=0.5, ema_decay=0.5)
    live.grad = torch.ones_like(live)
    optimizer.step()
    assert torch.equal(silent.detach(), before) and torch.equal(optimizer.state[silent]["ema"], before)
    assert not optimizer.state[silent]["exp_avg"].any()
    assert optimizer.param_groups[0][UPDATES] == 1 and not torch.equal(optimizer.state[live]["ema"], live.detach())


def test_it_goes_on_from_its_state_dict():
    def steps(optimizer, p, seeds):
        for seed in seeds:
            p.grad = random_tensor(seed, 3, 5)
            optimizer.step()

    straight, p = weight(11, 3, 5), weight(11, 3, 5)
    steps(AdamATan2([straight], 0.1), straight, range(6))
    first = AdamATan2([p], 0.1)
    steps(first, p, range(4))
    second = AdamATan2([p], 5.0)
    second.load_state_dict(first.state_dict())
    steps(second, p, range(4, 6))
    assert torch.equal(p.detach(), straight.detach()) and second.param_groups[0][UPDATES] == 6


@pytest.mark.parametrize("lost", STATE_KEYS)
def test_a_state_that_lost_a_part_is_refused(lost):
    p = weight(12, 3)
    optimizer = AdamATan2([p], 0.1)
    init_states(optimizer)
    assert set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq", "ema"}
    p.grad = torch.ones_like(p)
    optimizer.step()
    del optimizer.state[p][lost]
    before = p.detach().clone()
    with pytest.raises(KeyError, match=f"optimizer state without {lost}: the checkpoint was not written by AdamATan2"):
        optimizer.step()
    assert torch.equal(p.detach(), before)
