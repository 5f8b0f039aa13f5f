from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from safetensors.torch import load_file

from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.checkpoint.folders import find_iteration, read_run
from hrm_megatron.checkpoint.fsdp_folder import open_run
from hrm_megatron.checkpoint.manifest import MANIFEST_FILE
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.hf import read_hf, write_hf
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.native import read_native, write_native
from hrm_megatron.convert.to_megatron import write_megatron
from hrm_megatron.training.resume import check_model


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    """The golden native checkpoint (10 steps) as Megatron's."""
    folder = tmp_path_factory.mktemp("megatron") / "converted"
    write_megatron(read_native(golden / "native_ckpt"), folder)
    return folder


def test_native_to_megatron_to_native_is_bitwise(golden, converted, tmp_path, same_state):
    source, middle = read_native(golden / "native_ckpt"), read_megatron(find_iteration(converted))
    assert same_state(source, middle)
    assert middle.architecture == source.architecture and middle.training == source.training
    write_native(middle, tmp_path)
    assert same_state(source, read_native(tmp_path))
    assert read_native(tmp_path).training == source.training


def test_native_to_megatron_to_hf_is_bitwise(golden, converted, tmp_path):
    write_hf(read_megatron(find_iteration(converted)), tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, golden / "hf_export" / "ema"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "config.json").read_text()) \
        == json.loads((golden / "hf_export" / "ema" / "config.json").read_text())


def test_the_folder_says_what_megatron_asks(converted):
    assert (converted / "latest_checkpointed_iteration.txt").read_text() == "10"
    common = load_common_state_dict(str(converted / "iter_0000010"))
    args = common["args"]
    assert (args.num_layers, args.hidden_size, args.num_attention_heads) == (1, 24, 2) and args.add_position_embedding
    assert args.no_save_rng and args.consumed_train_samples == 0
    assert [group["updates"] for group in common["optimizer"]["optimizer"]["param_groups"]] == [10, 2]
    assert common["opt_param_scheduler"] == {"steps_done": 10}
    assert common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"


def test_unequal_sizes_survive(tmp_path, random_checkpoint, same_state):
    checkpoint = random_checkpoint(Architecture(2, 24, 3, 40, 250, h_cycles=3, l_cycles=2, norm_placement="post",
                                                init_scheme="fixed_normal", init_std=0.05, norm_epsilon=1e-5))
    write_megatron(checkpoint, tmp_path)
    again = read_megatron(find_iteration(tmp_path))
    assert again.architecture == checkpoint.architecture and again.training == checkpoint.training
    assert same_state(again, checkpoint)


@pytest.mark.parametrize("source, init_std", [("hf", 0.02), ("native", 0.02), ("native", None)])
def test_the_scale_of_the_embedding_is_part_of_the_model(tmp_path, random_checkpoint, source, init_std):
    """transformers' initializer_range and HRM-Text's fixed_normal: flags without them would train another function."""
    architecture = Architecture(1, 24, 3, 256, 256, init_scheme="fixed_normal", init_std=init_std)
    checkpoint = random_checkpoint(architecture)
    if source == "hf":
        write_hf(checkpoint, tmp_path / source, "raw")
        config = json.loads((tmp_path / source / "config.json").read_text())
        del config["embedding_scale"]  # as a config has it that only knows its initializer_range
        assert config["initializer_range"] == 0.02
        (tmp_path / source / "config.json").write_text(json.dumps(config))
    else:
        write_native(checkpoint, tmp_path / source)
    read = {"hf": read_hf, "native": read_native}[source](tmp_path / source)
    write_megatron(read, tmp_path / "megatron")
    theirs = read_run(open_run(find_iteration(tmp_path / "megatron")))[1]
    assert theirs.embedding_scale == 50
    check_model(tmp_path, theirs, architecture)
    with pytest.raises(ConfigError, match="embedding_scale=50.0, .* --init-scheme fixed_normal, --init-std"):
        check_model(tmp_path, theirs, dataclasses.replace(architecture, init_scheme="lecun_normal", init_std=None))


def test_without_optimizer_state_there_are_weights_but_no_ema(converted, monkeypatch):
    path = find_iteration(converted)
    shapes = DCPFolder(path).shapes()
    monkeypatch.setattr(DCPFolder, "shapes", lambda self: {
        name: shape for name, shape in shapes.items() if not name.startswith("optimizer.")})
    checkpoint = read_megatron(path)
    assert checkpoint.parts == {"raw"}
    stored = DCPFolder(path)
    assert all(torch.equal(tensor, stored.tensor(name)) for name, tensor in checkpoint.weights("raw"))
    with pytest.raises(ConfigError, match="holds no EMA weights, only raw; choose --weights raw"):
        next(checkpoint.weights("ema"))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_norm_of_the_h_stack_that_is_the_other_ones_too_is_no_damage(tmp_path, random_checkpoint, same_state, norm):
    architecture = Architecture(1, 24, 3, 256, 256, norm_placement=norm, h_norm_placement=norm)
    write_native(random_checkpoint(architecture), tmp_path / "native")
    source = read_native(tmp_path / "native")
    write_megatron(source, tmp_path / "megatron")
    again = read_megatron(find_iteration(tmp_path / "megatron"))
    assert same_state(source, again) and again.architecture.norm_placement == norm


def test_a_norm_without_a_flag_is_refused(tmp_path, random_checkpoint):
    architecture = dataclasses.replace(random_checkpoint().architecture, h_norm_placement="post")
    with pytest.raises(ConfigError, match="the H stack alone has post-norm layers.*save as native"):
        write_megatron(random_checkpoint(architecture), tmp_path)


def test_the_iteration_is_found(converted, tmp_path, monkeypatch):
    folder = shutil.copytree(converted, tmp_path / "copy")
    shutil.copytree(folder / "iter_0000010", folder / "iter_0000020")
    assert find_iteration(folder).name == "iter_0000010"
    assert find_iteration(folder, 20).name == "iter_0000020"
    assert find_iteration(folder / "iter_0000020").name == "iter_0000020"
    (tmp_path / "best").symlink_to(folder / "iter_0000020")
    (tmp_path / "iter_0000007").symlink_to(folder)
    monkeypatch.chdir(folder / "iter_0000020")
    assert {find_iteration(named) for named in (".", tmp_path / "best")} == {folder / "iter_0000020"}
    assert find_iteration(tmp_path / "iter_0000007") == tmp_path / "iter_0000007" / "iter_0000010"
    with pytest.raises(ConfigError, match=r"iter_0000030: not there; .*complete: iter_0000010, iter_0000020\)"):
        find_iteration(folder, 30)
    for name in (MANIFEST_FILE, "metadata.json"):
        (folder / "iter_0000010" / name).unlink()
    for path in (folder, folder / "iter_0000010"):
        with pytest.raises(ConfigError, match=r"iter_0000010: half-written; choose another with "
                                              r"--ckpt-step \(complete: iter_0000020\)"):
            find_iteration(path)
    (folder / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(ConfigError, match=r"iteration\.txt: holds no iteration; choose one with --ckpt-step"):
        find_iteration(folder)
    with pytest.raises(ConfigError, match=r"cannot read \(No such file.*none is complete there"):
        find_iteration(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(golden, tmp_path, converted, monkeypatch):
    with pytest.raises(ConfigError, match="holds no value common_state"):
        read_megatron(golden / "native_ckpt" / "fsdp2_epoch_1")
    stock = DCPFolder.object

    def without_cycles(self, *arguments):
        common = stock(self, *arguments)
        del common[0]["args"].h_cycles
        return common

    monkeypatch.setattr(DCPFolder, "object", without_cycles)
    with pytest.raises(ConfigError, match="a Megatron checkpoint, but not of an HRM .*h_cycles"):
        read_megatron(find_iteration(converted))
