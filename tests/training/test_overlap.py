"""Megatron's overlap of reduction and backward: the check of gradients, which must not hold it up."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hrm_megatron.parallel.cpu import activate

activate()

from megatron.core import rerun_state_machine  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup  # noqa: E402
from megatron.training import training as megatron_training  # noqa: E402

from hrm_megatron.training.overlap import GradientCheck, OverlappedReduction, check_gradients_once  # noqa: E402
from tests.model.small import batch, build  # noqa: E402


class Reads(TorchDispatchMode):
    """Counts values that the host takes from a tensor; on a GPU it waits for each."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def step(single_rank, monkeypatch):
    """Run a step of two micro-batches, whose gradients are multiplied by a factor: reads in backward, and at all."""
    monkeypatch.setattr(_ParamAndGradBucketGroup, "check_grads", _ParamAndGradBucketGroup.check_grads)
    monkeypatch.setattr(megatron_training, "finalize_model_grads", megatron_training.finalize_model_grads)
    model = build(calculate_per_token_loss=True)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(
        overlap_grad_reduce=True, use_distributed_optimizer=True, check_for_nan_in_grad=True, bucket_size=1000), model)
    assert len(ddp.bucket_groups) > 4
    reduction = OverlappedReduction()

    def run(factor=1.0):
        ddp.zero_grad_buffer()
        for number in range(2):
            with ddp.no_sync() if not number else Reads() as reads:
                reduction.before_forward(ddp, 5, None)
                (ddp(batch=batch(), bp_steps=5)[0].sum() * factor).backward()
                if number:
                    in_backward = reads.count
                    megatron_training.finalize_model_grads([ddp], torch.tensor([2]))
        return in_backward, reads.count, len(ddp.bucket_groups)
    yield run
    rerun_state_machine.destroy_rerun_state_machine()


def test_the_host_reads_once_a_step(step):
    step()  # counts gradients, without overlap
    assert (stock := step())[0] == 2 * stock[2], "Megatron waits for no bucket any more: GradientCheck may go"
    check_gradients_once(GradientCheck())
    assert step()[:2] == (0, 1)


@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_a_gradient_without_a_number_ends_the_run(step, factor):
    check_gradients_once(check := GradientCheck())
    step()
    with pytest.raises(RuntimeError, match="found NaN or Inf in local gradients before data-parallel communication"):
        step(float(factor))
    assert not check.norms
