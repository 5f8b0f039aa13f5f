"""What is written tensor by tensor is what the libraries write of a whole model, and no more is in memory."""
from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import weakref
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.safe_globals import SAFE_GLOBALS
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.checkpoint.stream import LazyTensor
from hrm_megatron.checkpoint.verify import verify
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.hf import read_hf, write_hf
from hrm_megatron.convert.ledger import EXPORT_FILE, Ledger, progress
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.native import read_native, write_native
from hrm_megatron.convert.safetensors_file import write_safetensors
from hrm_megatron.convert.table import table
from hrm_megatron.convert.to_megatron import SHARDING, stock_state, write_megatron
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.transformer_config import hrm_config

ARCHITECTURE = Architecture(2, 24, 3, 256, 250)
WRITERS = {"hf": write_hf, "native": write_native, "megatron": write_megatron}
READERS = {"hf": read_hf, "native": read_native, "megatron": lambda folder: read_megatron(find_iteration(folder))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_safetensors_file_is_the_librarys_to_the_byte(tmp_path, dtype):
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in (("b.z", (3, 5)), ("a", (7,)), ("b.a", (2, 1)))}
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    write_safetensors(tmp_path / "ours", {name: LazyTensor(tuple(tensor.shape), dtype, lambda tensor=tensor: tensor)
                                          for name, tensor in tensors.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("target", WRITERS)
def test_one_tensor_of_a_checkpoint_is_in_memory(tmp_path, random_checkpoint, source, target):
    """Of what a reader hands over nothing is left when the next is read, in all directions."""
    WRITERS[source](random_checkpoint(ARCHITECTURE), tmp_path / "source")
    read, alive = READERS[source](tmp_path / "source"), weakref.WeakSet()

    def watched(part, entry):
        assert not alive, (part, entry.megatron)
        tensor = read.read(part, entry)
        alive.add(tensor)
        return tensor

    kind = {"kind": "raw"} if target == "hf" else {}
    WRITERS[target](dataclasses.replace(read, read=watched), tmp_path / "target", **kind)
    again = READERS[target](tmp_path / "target")
    assert all(torch.equal(tensor, dict(read.weights("raw"))[name]) for name, tensor in again.weights("raw"))


def test_megatron_would_have_stored_the_same(tmp_path, random_checkpoint, single_rank):
    """The oracle is Megatron's own save of the model: keys, shapes, types, and what layers keep beside tensors."""
    checkpoint = random_checkpoint(ARCHITECTURE)
    write_megatron(checkpoint, tmp_path / "ours")
    weights = stock_state(HRMModel(hrm_config(ARCHITECTURE), seed=0))
    state = [dataclasses.replace(value, key=f"optimizer.state.{part}.{name}") for name, value in weights.items()
             for part in ("param", "exp_avg", "exp_avg_sq", "ema")
             if isinstance(value, ShardedTensor | ShardedTensorFactory) and name != "zL_init"]
    (tmp_path / "stock").mkdir()
    dist_checkpointing.save({"model": weights, "optimizer": state, "iteration": 7},
                            str(tmp_path / "stock"), content_metadata=dict(SHARDING))
    ours, stock = (FileSystemReader(folder).read_metadata().state_dict_metadata
                   for folder in (tmp_path / "ours" / "iter_0000007", tmp_path / "stock"))

    def kinds(entries):
        return {key: (entry.size, entry.properties) if isinstance(entry, TensorStorageMetadata) else "bytes"
                for key, entry in entries.items()}

    assert kinds(ours) == kinds(stock)
    folders = [DCPFolder(folder) for folder in (tmp_path / "ours" / "iter_0000007", tmp_path / "stock")]
    extra = [key for key, entry in stock.items() if "_extra_state" in key]
    assert extra and all(folders[0].object(key, [io.BytesIO]) == folders[1].object(key, [io.BytesIO]) for key in extra)
    loaded = dist_checkpointing.load(stock_state(HRMModel(hrm_config(ARCHITECTURE), seed=0)),
                                     str(tmp_path / "ours" / "iter_0000007"))
    expected = dict(checkpoint.weights("raw"))
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert verify(tmp_path / "ours" / "iter_0000007")


def test_weights_alone_are_stored_without_moments(tmp_path, random_checkpoint):
    checkpoint = random_checkpoint()
    write_megatron(checkpoint.only_weights("ema"), tmp_path)
    stored = DCPFolder(find_iteration(tmp_path))
    assert not any(key.startswith("optimizer") for key in stored.keys())  # noqa: SIM118  # no dict
    common = stored.object("common_state/shard_0_1", SAFE_GLOBALS)[0]
    assert common["args"].no_save_optim and "optimizer" not in common
    again = read_megatron(find_iteration(tmp_path))
    assert (again.iteration, again.embedding_updates, again.parts) == (0, 0, {"raw"})
    expected = dict(checkpoint.weights("ema"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.weights("raw"))


def test_the_ledger_knows_the_bytes_of_every_tensor(tmp_path, random_checkpoint):
    checkpoint, passed = random_checkpoint(), []
    ledger = Ledger(passed=passed.append)
    write_hf(checkpoint, tmp_path, "raw", "bfloat16", max_shard_size="30KB", ledger=ledger)
    ledger.write(tmp_path, source="a run", iteration=7)
    manifest = json.loads((tmp_path / EXPORT_FILE).read_text())
    tensors = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert (manifest["source"], manifest["iteration"]) == ("a run", 7) and manifest["tensors"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert manifest["tensors"][name] == dict(
            dtype="bfloat16", shape=list(tensor.shape),
            sha256=hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
    assert sum(passed) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_named(tmp_path, random_checkpoint, value):
    whole = random_checkpoint(ARCHITECTURE)

    def read(part, entry):
        tensor = whole.read(part, entry)
        if (part, entry.megatron) == ("ema", "l_stack.layers.1.mlp.linear_fc2.weight"):
            tensor = tensor.clone()
            tensor[3, 1:3] = value
        return tensor

    broken = dataclasses.replace(whole, read=read)
    for name, key in (("hf", "model.L_module.layers.1.mlp.down_proj.weight"),
                      ("native", "optim.state.model.L_level.core.layers.1.mlp.down_proj.weight.param_ema"),
                      ("megatron", "optimizer.state.ema.l_stack.layers.1.mlp.linear_fc2.weight")):
        with pytest.raises(ConfigError, match=f"{key}: 2 of 6144 numbers are NaN or infinite; .*--allow-nonfinite"):
            WRITERS[name](broken, tmp_path / "refused" / name)
        ledger = Ledger(allow_nonfinite=True)
        WRITERS[name](broken, tmp_path / name, ledger=ledger)
        assert ledger.not_finite == [key]


def test_progress_is_a_line_at_times_where_there_is_no_terminal():
    out, clock = io.StringIO(), iter([0, 4, 11, 12, 22])
    with progress(4_000_000_000, out, lambda: next(clock)) as passed:
        for _ in range(4):
            passed(1_000_000_000)
    assert out.getvalue() == ("written: 2.00 of 4.00 GB, 182 MB/s\n"
                              "written: 4.00 of 4.00 GB, 182 MB/s\n")


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with progress(4_000_000, out := Terminal()) as passed:
        passed(4_000_000)
    assert "100%" in out.getvalue() and "4.00M/4.00M" in out.getvalue()


def test_the_library_reads_what_is_sharded(tmp_path, random_checkpoint):
    checkpoint = random_checkpoint()
    write_hf(checkpoint, tmp_path, "raw", max_shard_size="30KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    expected = {entry.hf: entry.from_megatron(checkpoint.part_of("raw", entry))
                for entry in table(checkpoint.architecture)}
    for name, tensor in expected.items():
        stored = load_file(Path(tmp_path / index[name]))[name]
        assert torch.equal(stored, tensor.float())
