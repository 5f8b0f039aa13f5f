"""Transformer Engine's layers on a GPU: against the local ones, FP8 against bf16, checkpoints of one in the other.

What a CPU can tell of them is in tests/te.
"""
import numpy as np
import pytest
import torch

from tests.gpu.conftest import SIZES, relative

pytestmark = pytest.mark.gpu
LOCAL, TE = "local", "transformer_engine"
RECIPES = {"tensorwise": (8, 9), "delayed": (8, 9), "mxfp8": (10, 0)}  # from this compute capability on
LENGTHS = [(40, 61), (17, 0), (90, 43)]  # of 256 positions


@pytest.fixture
def recipe(request):
    """An FP8 recipe that this GPU has."""
    capability = torch.cuda.get_device_capability()
    if capability < RECIPES[request.param] or (request.param == "mxfp8" and capability >= (12, 0)):
        pytest.skip(f"{request.param} is not for compute capability {capability}")
    return request.param


@pytest.fixture(scope="module")
def models(single_rank):
    """Build a model of 2 + 2 layers on the GPU with the layers that are named."""
    pytest.importorskip("transformer_engine.pytorch")
    from hrm_megatron.config import Architecture
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    def build(implementation, seed=3, **overrides):
        return HRMModel(hrm_config(Architecture(2, 256, 4, 768, 1000), transformer_impl=implementation, **overrides),
                        seed).cuda()
    return build


@pytest.fixture
def batch():
    from hrm_megatron.data.batch import PackedBatch, assemble_row

    generator = np.random.default_rng(5)
    examples = [(generator.integers(1000, size=p), generator.integers(1000, size=r + 1)) for p, r in LENGTHS]
    rows = assemble_row(examples, 256)
    return PackedBatch.from_rows({name: tensor[None] for name, tensor in rows.items()}).to("cuda")


def step(model, batch, bp_steps=5, fused=False):
    """Losses and gradients of one step of one micro-batch."""
    for weight in model.parameters() if fused else ():
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
    model.set_is_first_microbatch()
    losses = model(batch=batch, bp_steps=bp_steps)[0]
    losses.sum().backward()
    return losses.detach(), {
        name: weight.main_grad if getattr(weight, "grad_added_to_main_grad", False) else weight.grad
        for name, weight in model.named_parameters()}


@pytest.mark.parametrize("fused", [False, True], ids=["autograd adds", "layers add"])
@pytest.mark.parametrize("dtype, loss_tolerance, gradient_tolerance", [
    # Transformer Engine multiplies fp32 in TF32, which keeps 10 bits: 2^-11 for each element of a sum, of 8 ticks.
    (torch.float32, 1e-2, 1e-2),
    # bf16 keeps 7 bits. Each side is 0.01 (logits) and about as much (gradients) from fp32 on a CPU.
    (torch.bfloat16, 2e-2, 5e-2)], ids=["fp32", "bf16"])
def test_layers_agree_with_the_local_ones(models, batch, parity, dtype, loss_tolerance, gradient_tolerance, fused):
    precision = dict(params_dtype=dtype, bf16=dtype == torch.bfloat16)
    for bp_steps in (2, 5, 8):
        losses, gradients = step(models(LOCAL, **precision), batch, bp_steps)
        ours, theirs = step(models(TE, gradient_accumulation_fusion=fused, **precision), batch, bp_steps, fused)
        parity(f"{dtype}, bp {bp_steps}: losses", relative(ours, losses), loss_tolerance)
        for name, gradient in gradients.items():
            assert (gradient is None) == (theirs[name] is None), name
        worst = max(relative(theirs[name], g) for name, g in gradients.items() if g is not None)
        parity(f"{dtype}, bp {bp_steps}: gradients", worst, gradient_tolerance)


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
def test_fp8_casts_follow_the_weights(models, batch, parity, recipe):
    """Two steps with a changed weight between them: the second must not use the cast of the first."""
    precision = dict(params_dtype=torch.bfloat16, bf16=True)
    fp8, bf16 = (models(TE, gradient_accumulation_fusion=True, **precision, **more)
                 for more in (dict(fp8="hybrid", fp8_recipe=recipe), {}))
    for _ in range(2):
        for model in (fp8, bf16):
            got = step(model, batch, fused=True)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "linear_fc2" in name:
                        weight.neg_()  # its largest value, which delayed scaling goes by, stays
            if model is fp8:
                ours = got
    # e4m3 rounds to 2^-4 of an element; the errors of a sum are independent.
    parity(f"{recipe}: losses of FP8 and bf16", relative(ours[0], got[0]), 0.05)


@pytest.mark.parametrize("saved, loaded", [(LOCAL, TE), (TE, LOCAL)])
def test_checkpoints_are_exchanged_bitwise(models, saved, loaded, tmp_path):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    source, target = models(saved, seed=1), models(loaded, seed=2)
    dist_checkpointing.save(source.sharded_state_dict(), tmp_path)
    state = dist_checkpointing.load(target.sharded_state_dict(), tmp_path, strict=StrictHandling.RAISE_ALL)
    target.load_state_dict(state, strict=True)
    ours, theirs = dict(source.named_parameters()), dict(target.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def train(run_on_a_gpu):
    """Train with Transformer Engine's layers unless others are named: losses by step."""
    pytest.importorskip("transformer_engine.pytorch")

    def train(*flags):
        return run_on_a_gpu(*SIZES, *flags, *([] if LOCAL in flags else ["--transformer-impl", TE]))
    return train


@pytest.fixture(scope="module")
def bf16_losses(train):
    return train("--train-iters", 200)


@pytest.mark.parametrize("parameters", [[], ["--fp8-param-gather"]], ids=["cast", "FP8 parameters"])
@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
def test_the_loss_curve_of_fp8_is_that_of_bf16(train, bf16_losses, parity, recipe, parameters):
    losses = train("--train-iters", 200, "--fp8-format", "hybrid", "--fp8-recipe", recipe, *parameters)
    assert losses.keys() == bf16_losses.keys() == set(range(1, 201))
    # Single steps differ by the noise of a batch that is learnt a step earlier or later.
    ours, theirs = (np.array([curve[step] for step in sorted(curve)]).reshape(10, 20).mean(1)
                    for curve in (losses, bf16_losses))
    parity(f"{recipe}: loss, means of 20 steps", float(np.abs(ours / theirs - 1).max()), 0.02)


def test_a_run_goes_on_with_the_other_layers(train, tmp_path):
    """TE saves, local goes on; and TE goes on from what it saved, with delayed scaling's scales."""
    save = ["--train-iters", 12, "--save", tmp_path / "a", "--save-interval", 8]
    whole = train(*save)
    local = train("--train-iters", 12, "--load", tmp_path / "a", "--ckpt-step", 8, "--transformer-impl", LOCAL)
    assert local.keys() == {9, 10, 11, 12}
    for at, loss in local.items():
        assert loss == pytest.approx(whole[at], rel=0.01)  # bf16, as above


@pytest.mark.parametrize("recipe", ["delayed"], indirect=True)
def test_delayed_scaling_is_resumed(train, tmp_path, recipe):
    fp8 = ["--train-iters", 12, "--fp8-format", "hybrid", "--fp8-recipe", recipe]
    whole = train(*fp8, "--save", tmp_path / "a", "--save-interval", 8)
    resumed = train(*fp8, "--load", tmp_path / "a", "--ckpt-step", 8)
    assert resumed.keys() == {9, 10, 11, 12}
    for at, loss in resumed.items():
        assert loss == pytest.approx(whole[at], rel=1e-3)  # sums by atomic operations have no fixed order
