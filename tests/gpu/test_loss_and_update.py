"""The chunked head and the fused optimizer step on a device against double precision; on a CPU nothing is compiled."""
import pytest
import torch
import torch.nn.functional as F

from tests.rounding import UNIT, allowed, error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def losses_and_gradients(x, weight, labels, g):
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    losses = F.cross_entropy(F.linear(x, weight), labels, reduction="none")
    (losses * g).sum().backward()
    return losses.detach(), x.grad, weight.grad


@pytest.mark.parametrize("buffered", [False, True], ids=["returned", "main_grad"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, None), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_head_scores_and_differentiates_as_the_plain_loss(single_rank, parity, device, dtype, tolerance, buffered):
    # bf16: logits near 10 are rounded by up to 2^-6 of themselves, gradients once more by 2^-9.
    from hrm_megatron.model.head import LabelScores

    n, h, v = 300, 64, 1000
    x, weight, g = draw(1, n, h).to(dtype), (draw(2, v, h) / 4).to(dtype), draw(3, n)
    labels = torch.randint(v, (n,), generator=torch.Generator().manual_seed(4))
    labels[::2] = F.linear(x.double(), weight.double()).argmax(-1)[::2]
    (exact, *of_exact), (plain, *of_plain) = (losses_and_gradients(x.to(wide), weight.to(wide), labels, g)
                                              for wide in (torch.float64, torch.float32))
    if dtype == torch.float32:
        tolerance = allowed([plain, *of_plain], [exact, *of_exact])

    x, weight = (t.to(device).requires_grad_() for t in (x, weight))
    buffer = torch.zeros(v, h, device=device) if buffered else None
    scores = LabelScores.apply(x, weight, labels.to(device), 77, torch.distributed.group.WORLD, buffer)
    (scores[0] * g.to(device)).sum().backward()
    for name, have, want in (("losses", scores[0], exact), ("dx", x.grad, of_exact[0]),
                             ("dw", buffer if buffered else weight.grad, of_exact[1])):
        parity(f"head on {device}, {str(dtype)[6:]}, {'main_grad' if buffered else 'returned'}: {name}",
               error(have.detach().cpu(), want), tolerance)
    if dtype == torch.float32:
        assert (scores[1, ::2] == 1).all() and scores[1, 1::2].sum() < 10


@pytest.mark.parametrize("device", DEVICES)
def test_forty_steps_of_the_optimizer_equal_double_precision(parity, device):
    from hrm_megatron.optim.adam_atan2 import STATE_KEYS, AdamATan2, update

    shapes = [(37, 5), (1001,), (64, 33), (0,), (7,)]
    start = [draw(i, *shape) for i, shape in enumerate(shapes)]
    ours = [torch.nn.Parameter(p.to(device)) for p in start]
    exact = [torch.nn.Parameter(p.double()) for p in start]
    optimizers = [AdamATan2(parameters, 0.0, ema_decay=0.9) for parameters in (ours, exact)]
    optimizers[1].update = update
    for step in range(40):
        for i, (p, q) in enumerate(zip(ours, exact, strict=True)):
            grad = draw(100 * step + i, *p.shape) * 10.0 ** (step % 7 - 3)
            grad[::3] = 0.0
            p.grad, q.grad = grad.to(device), grad.double()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 * min(1, (step + 1) / 10)
            optimizer.step()
    for name in ("p", *STATE_KEYS):
        worst = 0.0
        for p, q in zip(ours, exact, strict=True):
            have, want = (p, q) if name == "p" else (optimizers[0].state[p][name], optimizers[1].state[q][name])
            if want.numel():
                worst = max(worst, ((have.detach().cpu().double() - want).abs().max() / want.abs().max()).item())
        # Each step rounds a decayed value, and its sum with what is added.
        parity(f"AdamATan2 on {device}, 40 steps: {name}", worst, 2 * 40 * UNIT)
