"""A small model over one packed row of three examples: its gradients, and what a forward pass keeps for them."""
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hrm_megatron.config import Architecture
from hrm_megatron.data.batch import PackedBatch, assemble_row

ARCHITECTURE = Architecture(2, 24, 3, 40, 250)
TARGETS = [(range(1, 5), range(4)), (range(3, 8), range(1)), (range(1, 2), range(9, 16))]
ROW_TOKENS = sum(len(p) + len(t) - 1 for p, t in TARGETS) + 1


def build(**settings):
    """Build the model; there must be a process group (`single_rank`)."""
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    return HRMModel(hrm_config(ARCHITECTURE, **settings), seed=5).train()


def batch():
    return PackedBatch.from_rows({name: tensor[None] for name, tensor in assemble_row(TARGETS, ROW_TOKENS).items()})


def gradients(model, bp_steps):
    model(batch=batch(), bp_steps=bp_steps)[0].sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def kept_bytes(run, leave_out):
    """Bytes of all that `run` saves for its backward and has not given back at its end, each storage once; without
    `leave_out`."""
    known, kept = {t.untyped_storage().data_ptr() for t in leave_out}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.untyped_storage())
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def furthest(have, wanted):
    """Largest error of a gradient, of its largest element; each must be there where it is wanted."""
    for name, want in wanted.items():
        assert (have[name] is None) == (want is None), name
    return max(((have[name] - want).abs().max() / want.abs().max()).item()
               for name, want in wanted.items() if want is not None)


class Sums(TorchDispatchMode):
    """Counts additions of tensors of these shapes and this dtype: how autograd joins the gradients of one weight."""

    def __init__(self, shapes, dtype):
        super().__init__()
        self.shapes, self.dtype, self.found = {*shapes}, dtype, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "aten.add" in str(func) and out.shape in self.shapes and out.dtype == self.dtype:
            self.found[tuple(out.shape)] += 1
        return out
