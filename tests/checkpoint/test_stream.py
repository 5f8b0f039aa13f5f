"""Folders that are written tensor by tensor are those that torch and Megatron write of a whole model in memory."""
from __future__ import annotations

import io
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.checkpoint.stream import LazyTensor, save_lazily
from hrm_megatron.config import ConfigError

SHAPES = {"wide": (3, 70), "half": (5,), "single": ()}


def tensors():
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16 if name == "half" else torch.float32)
            for name, shape in SHAPES.items()}


def test_a_folder_is_the_one_that_torch_writes(tmp_path, torch_reads):
    state = {"model": tensors(), "optim": {"groups": [{"lr": torch.tensor(0.5), "betas": (0.9, 0.95)}], "step": 3}}
    dcp.save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    lazy = {name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
            for name, tensor in state["model"].items()}
    save_lazily({**state, "model": lazy}, tmp_path / "ours")
    ours, stock = (FileSystemReader(tmp_path / name).read_metadata() for name in ("ours", "stock"))
    assert ours.state_dict_metadata == stock.state_dict_metadata and ours.planner_data == stock.planner_data
    read = torch_reads(tmp_path / "ours")
    assert all(torch.equal(read[f"model.{name}"], tensor) for name, tensor in state["model"].items())
    groups = {"optim": {"groups": [{"lr": torch.zeros(()), "betas": None}], "step": None}}
    dcp.load(groups, checkpoint_id=tmp_path / "ours", no_dist=True)
    assert groups["optim"] == state["optim"]
    DCPFolder(tmp_path / "ours").check_files()


def test_a_tensor_is_gone_before_the_next_is_made(tmp_path):
    alive = weakref.WeakSet()

    def make():
        assert not alive
        tensor = torch.ones(4, 5)
        alive.add(tensor)
        return tensor

    save_lazily({f"tensor {i}": LazyTensor((4, 5), torch.float32, make) for i in range(4)}, tmp_path, flatten=False)
    assert not alive and DCPFolder(tmp_path).tensor("tensor 3").sum() == 20


def test_a_view_is_stored_without_what_is_around_it(tmp_path):
    whole = torch.randn(1000, 40)
    views = {"rows": whole[10:12], "transposed": whole[:2].T, "expanded": whole[3:4].expand(3, 40)}
    save_lazily({name: LazyTensor(tuple(view.shape), view.dtype, lambda view=view: view)
                 for name, view in views.items()}, tmp_path, flatten=False)
    stored = DCPFolder(tmp_path)
    assert all(torch.equal(stored.tensor(name), view) for name, view in views.items())
    assert (tmp_path / "__0_0.distcp").stat().st_size < whole.nbytes / 10


def test_bytes_are_stored_as_they_are(tmp_path):
    stored = io.BytesIO()
    torch.save([{"iteration": 7}], stored)
    save_lazily({"common/shard_0_1": stored}, tmp_path, flatten=False)
    assert DCPFolder(tmp_path).object("common/shard_0_1") == [{"iteration": 7}]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ConfigError, OSError])
def test_what_goes_wrong_while_a_tensor_is_made_is_raised_as_it_is(tmp_path, failure):
    def make():
        raise failure("why")

    with pytest.raises(failure, match="why"):
        save_lazily({"a": LazyTensor((1,), torch.float32, make)}, tmp_path)
    assert not (tmp_path / ".metadata").exists()
