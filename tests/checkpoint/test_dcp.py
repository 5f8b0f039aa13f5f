from __future__ import annotations

import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.config import ConfigError

KEY = "model.lm_head.weight"


class Evil:
    """Unpickles to a call of `print`."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.fixture
def copy(golden, tmp_path):
    """The two-rank checkpoint, to be damaged."""
    return shutil.copytree(golden / "native_ckpt_ws2" / "fsdp2_epoch_1", tmp_path / "copy")


@pytest.mark.parametrize("name", ["native_ckpt/fsdp2_epoch_1", "native_ckpt_ws2/fsdp2_epoch_1"])
def test_tensors_are_those_that_torch_reads(golden, torch_reads, name):
    ours, theirs = DCPFolder(golden / name), torch_reads(golden / name)
    assert ours.shapes() == {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    for key, tensor in theirs.items():
        assert torch.equal(ours.tensor(key), tensor) and ours.tensor(key).dtype == tensor.dtype


def test_pieces_cut_along_two_axes_are_put_together(tmp_path):
    whole = torch.arange(35.0).view(5, 7)
    dcp.save({"w": whole}, checkpoint_id=tmp_path, no_dist=True)
    metadata = FileSystemReader(tmp_path).read_metadata()
    entry, info = metadata.state_dict_metadata["w"], metadata.storage_data.pop(MetadataIndex("w", [0, 0]))
    entry.chunks.clear()
    with (tmp_path / info.relative_path).open("wb") as file:
        for i, (row, column) in enumerate([(0, 0), (0, 4), (3, 0), (3, 4)]):
            piece = whole[row:row + 3, column:column + 4].clone()
            start = file.tell()
            torch.save(piece, file)
            index = MetadataIndex("w", [row, column], i)
            metadata.storage_data[index] = type(info)(info.relative_path, start, file.tell() - start)
            entry.chunks.append(type("Chunk", (), dict(offsets=index.offset, sizes=piece.shape)))
    folder = DCPFolder(tmp_path)
    folder._entries, folder._storage = metadata.state_dict_metadata, metadata.storage_data
    assert torch.equal(folder.tensor("w"), whole)


def test_values_are_read_and_only_plain_ones(golden, tmp_path):
    folder = DCPFolder(golden / "native_ckpt" / "fsdp2_epoch_1")
    assert folder.object("optim.param_groups.0.betas") == (0.9, 0.95)
    dcp.save({"plain": (1, "two"), "evil": Evil()}, checkpoint_id=tmp_path, no_dist=True)
    folder = DCPFolder(tmp_path)
    assert folder.object("plain") == (1, "two")
    with pytest.raises(ConfigError, match=r"__0_0\.distcp: evil is damaged or unsafe \(.*copy"):
        folder.object("evil")


def test_metadata_cannot_run_code(copy, capsys):
    (copy / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match=r"\.metadata: refused builtins\.print, .*do not use this file"):
        DCPFolder(copy)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("damage, message", [
    (lambda copy: (copy / ".metadata").unlink(), r"\.metadata: cannot read \(No such file"),
    (lambda copy: (copy / ".metadata").write_bytes(b"\x80\x04"), r"\.metadata: damaged \("),
    (lambda copy: (copy / "__1_0.distcp").unlink(), r"__1_0\.distcp: cannot read \S+ \(No such file"),
    (lambda copy: (copy / "__1_0.distcp").write_bytes((copy / "__1_0.distcp").read_bytes()[:1000]),
     r"__1_0\.distcp: ends \d+ bytes before the end of \S+: truncated; copy"),
    (lambda copy: (copy / "__0_0.distcp").write_bytes(bytes((copy / "__0_0.distcp").stat().st_size)),
     r"__0_0\.distcp: \S+ is damaged or unsafe"),
])
def test_a_damaged_folder_is_refused_by_file_and_reason(copy, damage, message):
    damage(copy)
    with pytest.raises(ConfigError, match=message):
        DCPFolder(copy).tensor(KEY)


def test_what_is_not_there_is_refused_by_name(copy):
    with pytest.raises(ConfigError, match="holds no tensor model.nothing"):
        DCPFolder(copy).tensor("model.nothing")
    with pytest.raises(ConfigError, match=f"holds no value {KEY}"):
        DCPFolder(copy).object(KEY)


def test_data_outside_the_folder_is_refused(copy):
    folder = DCPFolder(copy)
    for info in folder._storage.values():
        info.relative_path = "../" + info.relative_path
    with pytest.raises(ConfigError, match=r"is stored at '\.\./__0_0\.distcp'.*only plain files of the folder"):
        folder.tensor(KEY)
