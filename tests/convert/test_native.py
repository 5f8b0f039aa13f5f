from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import FileSystemReader

from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.native import read_native, write_native
from hrm_megatron.convert.table import table


def test_settings_and_counts_of_the_golden_checkpoint(golden):
    checkpoint = read_native(golden / "native_ckpt")
    assert checkpoint.architecture == Architecture(
        num_layers=1, hidden_size=24, num_attention_heads=2, ffn_hidden_size=256, vocab_size=256)
    assert (checkpoint.iteration, checkpoint.embedding_updates) == (10, 2)
    training = checkpoint.training
    assert (training.lr, training.min_lr, training.warmup_steps, training.total_steps) == (0.01, 0.01, 4, 52)
    assert (training.ema_decay, training.bp_warmup_fraction, training.seq_length) == (0.8, 0.5, 48)


@pytest.mark.parametrize("name, counts", [("native_ckpt", (10, 2)), ("native_ckpt_ws2", (4, 3))])
def test_state_is_read_from_any_number_of_ranks(golden, torch_reads, name, counts):
    checkpoint, stored = read_native(golden / name), torch_reads(golden / name / "fsdp2_epoch_1")
    assert (checkpoint.iteration, checkpoint.embedding_updates) == counts
    names = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "ema": "param_ema"}
    for entry in table(checkpoint.architecture):
        assert torch.equal(entry.from_megatron(checkpoint.read("raw", entry)), stored[f"model.{entry.native}"])
        for part, theirs in names.items() if entry.trained else ():
            assert torch.equal(entry.from_megatron(checkpoint.read(part, entry)),
                               stored[f"optim.state.{entry.native}.{theirs}"])


def test_what_is_written_has_the_keys_shapes_and_values_of_the_reference(golden, tmp_path, torch_reads):
    source = golden / "native_ckpt"
    write_native(read_native(source), tmp_path)
    ours, theirs = (FileSystemReader(folder / "fsdp2_epoch_1").read_metadata() for folder in (tmp_path, source))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    keys = json.loads((golden / "native_ckpt.json").read_text())["keys"]
    assert {key: value.get("shape") for key, value in keys.items()} == {
        key: list(entry.size) if hasattr(entry, "size") else None for key, entry in ours.state_dict_metadata.items()}
    stored = torch_reads(source / "fsdp2_epoch_1")
    for key, tensor in torch_reads(tmp_path / "fsdp2_epoch_1").items():
        assert torch.equal(tensor, stored[key]), key
    assert torch.load(tmp_path / "carry_epoch_1.0.pt", weights_only=True) is None
    for name, free in (("all_config", {"checkpoint_path", "fwd_bwd_dtype", "project_name", "run_name"}),
                       ("train_metadata", {"total_length"})):
        one, other = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for folder in (tmp_path, source))
        assert one.keys() == other.keys()
        assert {key for key in one if one[key] != other[key]} <= free


def test_groups_load_as_torch_optimizers_have_them(tmp_path, random_checkpoint):
    checkpoint = random_checkpoint(Architecture(2, 24, 3, 256, 250, norm_placement="post", h_norm_placement="pre"))
    write_native(checkpoint, tmp_path)
    group = {"lr": torch.zeros(()), "betas": None, "weight_decay": None, "ema": None, "params": None}
    dcp.load({"optim": {"param_groups": [group]}}, checkpoint_id=tmp_path / "fsdp2_epoch_1", no_dist=True)
    assert group == {"lr": torch.tensor(0.25), "betas": (0.9, 0.95), "weight_decay": 0.1, "ema": 0.9999,
                     "params": [entry.native for entry in table(checkpoint.architecture) if entry.trained]}


@pytest.mark.parametrize("fields", [
    dict(norm_placement="post", h_norm_placement="pre"), dict(init_scheme="fixed_normal", init_std=0.05),
    dict(ffn_hidden_size=512, h_cycles=4, rope_theta=5e4), dict(attention_mask="causal")])
def test_architecture_and_state_survive(tmp_path, random_checkpoint, same_state, fields):
    checkpoint = random_checkpoint(Architecture(**dict(
        num_layers=2, hidden_size=24, num_attention_heads=3, ffn_hidden_size=256, vocab_size=256) | fields))
    write_native(checkpoint, tmp_path)
    again = read_native(tmp_path)
    assert again.architecture == checkpoint.architecture
    assert again.training == checkpoint.training
    assert same_state(again, checkpoint)


def test_sizes_that_the_reference_cannot_build_are_refused(tmp_path, random_checkpoint):
    with pytest.raises(ConfigError, match="ffn_hidden_size=40 is no multiple of 256.*save as hf or megatron"):
        write_native(random_checkpoint(), tmp_path)


def _edit(name, *path, value):
    def edit(folder):
        settings = yaml.safe_load((folder / name).read_text())
        place = settings
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (folder / name).write_text(yaml.safe_dump(settings))
    return edit


@pytest.mark.parametrize("damage, message", [
    (_edit("all_config.yaml", "arch", "name", value="baselines.moe_nocarry@Mixture"),
     r"all_config\.yaml: arch\.name: .*Mixture' is no network that is built here"),
    (_edit("all_config.yaml", "arch", "n_layers", value=3), r"arch\.n_layers: 3 layers cannot be shared evenly"),
    (_edit("all_config.yaml", "arch", "n_layers", value=4), r"tensors missing: .*layers\.1\..* and 5 more"),
    (_edit("all_config.yaml", "arch", "hidden_size", value=32), r"has shape .*its settings ask for"),
    (_edit("all_config.yaml", "arch", "num_heads", value="many"), r"all_config\.yaml: arch\.num_heads: 'many' is no w"),
    (_edit("all_config.yaml", "arch", "H_cycles", value=1.5), r"all_config\.yaml: arch\.H_cycles: 1\.5 is no whole"),
    (_edit("all_config.yaml", "seed", value=1.5), r"all_config\.yaml: seed: 1\.5 is no whole number"),
    (_edit("train_metadata.yaml", "max_seq_len", value="48"), r"train_metadata\.yaml: max_seq_len: '48' is no whole"),
    (_edit("all_config.yaml", "arch", "H_override", value={"expansion": 2}), "only norm_type may differ"),
    (_edit("all_config.yaml", "data", value=[1]), "odd one .'list' object has no attribute 'get'"),
    (_edit("train_metadata.yaml", "vocab_size", value=1000), r"has shape \[256, 24\]"),
    (lambda folder: (folder / "train_metadata.yaml").unlink(), r"train_metadata\.yaml: cannot read"),
    (lambda folder: (folder / "all_config.yaml").write_text("a: ["), r"all_config\.yaml: not YAML"),
    (lambda folder: (folder / "all_config.yaml").write_text("beta1: 0.9"), "lacks a setting .*'arch'"),
    (lambda folder: shutil.rmtree(folder / "fsdp2_epoch_1"), "no fsdp2_epoch_N in it; give the folder"),
])
def test_a_folder_that_does_not_fit_is_refused_by_place_and_value(golden, tmp_path, damage, message):
    folder = shutil.copytree(golden / "native_ckpt", tmp_path / "copy")
    damage(folder)
    with pytest.raises(ConfigError, match=message) as error:
        read_native(folder)
    assert "\n" not in str(error.value)


def test_the_start_of_z_l_may_be_stored_in_fp32(golden, monkeypatch, random_checkpoint):
    stock = DCPFolder.tensor
    rounded = dict(read_native(golden / "native_ckpt").weights("raw"))["zL_init"]
    for change in (0, 1e-3):
        monkeypatch.setattr(DCPFolder, "tensor", lambda self, key, change=change: stock(self, key).float() + change)
        weights = read_native(golden / "native_ckpt").weights("raw")
        if change:
            with pytest.raises(ConfigError, match=r"model\.zL_init: holds .*, which bfloat16 does not have"):
                dict(weights)
        else:
            start = dict(weights)["zL_init"]
            assert start.dtype == torch.bfloat16 and torch.equal(start, rounded)


def test_an_epoch_can_be_chosen(golden):
    assert read_native(golden / "native_ckpt", 1).iteration == 10
    with pytest.raises(ConfigError, match="no fsdp2_epoch_2; choose --ckpt-step from 1"):
        read_native(golden / "native_ckpt", 2)
