"""The EMA in the place of the weights, and back: in one process with the optimizer that a run has."""
import torch

from hrm_megatron.config import Architecture
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.optim.averaged_weights import averaged_weights
from hrm_megatron.optim.schedule import LRSchedule

ARCHITECTURE = Architecture(2, 24, 3, 40, 250, h_cycles=2, l_cycles=2)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    prefix, target = (torch.randint(1, 250, (n,), generator=generator).numpy() for n in (5, 8))
    return PackedBatch.from_rows({name: t[None] for name, t in assemble_row([(prefix, target)], 17).items()})


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def test_the_model_computes_with_the_ema_and_every_bit_comes_back(trainer):
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    def trained(steps):
        model = HRMModel(hrm_config(ARCHITECTURE, calculate_per_token_loss=True), 5)
        run = trainer(model, LRSchedule(0.01, 0.01, 0, 9), ema_decay=0.5)
        for step in range(steps):
            run.step([batch(step)], 4)
        return run

    def weights(run):
        return {name: weight.detach().clone() for name, weight in run.model.named_parameters()}

    def state_of(run):
        return {name: tensor.clone() for name, tensor in run.state().items()}

    run = trained(3)
    (part,) = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    before, state = weights(run), state_of(run)
    with averaged_weights(run.optimizer, part.model_chunks):
        inside = weights(run)
    for name, weight in inside.items():
        assert torch.equal(weight, state[f"ema.{name}"].view_as(weight)), name
        assert not torch.equal(weight, before[name])
    assert_equal(weights(run), before)
    assert_equal(state_of(run), state)

    undisturbed = trained(3)
    losses = [each.step([batch(9)], 4) for each in (run, undisturbed)]
    assert losses[0] == losses[1]
    assert_equal(state_of(run), state_of(undisturbed))
