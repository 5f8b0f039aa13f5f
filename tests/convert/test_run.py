from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import resource
import shutil
import sys

import pytest
import torch

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.config import ConfigError
from hrm_megatron.convert import run
from hrm_megatron.convert.hf import read_hf
from hrm_megatron.convert.ledger import EXPORT_FILE
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.native import read_native
from hrm_megatron.data.folder_lock import lock
from hrm_megatron.generate.load import opened, weights_kind
from hrm_megatron.training.save_lock import LOCK_FILE
from tests.convert.records import make_older
from tests.damage import flip_bit_of_tensor


@pytest.fixture
def command(golden, tmp_path, tool, capsys):
    """Run the tool from the golden native checkpoint to an output; return (status, stdout, stderr)."""
    def call(*flags, save_format="hf", save="out", load=golden / "native_ckpt", load_format="native"):
        status = tool(["--load", str(load), "--load-format", load_format, "--save", str(tmp_path / save),
                       "--save-format", save_format, *flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return call


def _entries(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_it_converts_and_says_what(command, tmp_path, golden):
    status, out, err = command()
    assert (status, err.count("error")) == (0, 0)
    assert "ema weights of iteration 10, 11 tensors" in out
    assert "no tokenizer beside them, and token ids of HRM-Text's tokenizers (--tokenizer-model" in out
    assert _entries(tmp_path) == ["out"]
    status, out, _ = command("--weights", "raw", save="raw")
    source = dict(read_native(golden / "native_ckpt").weights("raw"))
    assert status == 0 and all(torch.equal(tensor, source[name])
                               for name, tensor in read_hf(tmp_path / "raw").weights("raw"))


def test_every_format_leads_to_every_other(command, tmp_path, golden, same_state):
    source = read_native(golden / "native_ckpt")
    assert command(save_format="megatron", save="m")[0] == 0
    assert command(load=tmp_path / "m", load_format="megatron", save_format="native", save="n")[0] == 0
    assert same_state(source, read_native(tmp_path / "n"))
    assert command(load=tmp_path / "m", load_format="megatron", save="h")[0] == 0
    assert command(load=tmp_path / "h", load_format="hf", save_format="megatron", save="m2")[0] == 0
    imported, ema = read_megatron(find_iteration(tmp_path / "m2")), dict(source.weights("ema"))
    assert imported.iteration == 0
    assert imported.parts == {"raw"}
    for number, flags in enumerate(([], ["--weights", "ema"])):  # before a first step the EMA is the weights
        assert command(*flags, load=tmp_path / "m2", load_format="megatron", save=f"h{number}")[0] == 0
        exported = read_hf(tmp_path / f"h{number}")
        assert all(torch.equal(tensor, ema[name]) for name, tensor in exported.weights(exported.default_kind()))
    assert all(torch.equal(tensor, ema[name]) for name, tensor in imported.weights("ema"))
    assert command("--weights", "ema", save_format="native", save="fresh")[0] == 0
    fresh = read_native(tmp_path / "fresh")
    assert fresh.iteration == 0 and all(torch.equal(tensor, ema[name]) for name, tensor in fresh.weights("ema"))


def test_an_export_says_which_weights_it_holds(command, tmp_path):
    """Through another export of it too."""
    for kind in ("ema", "raw"):
        assert command("--weights", kind, save=kind)[0] == 0
        assert command(load=tmp_path / kind, load_format="hf", save=f"{kind}2")[0] == 0
        for folder in (tmp_path / kind, tmp_path / f"{kind}2"):
            with opened(folder) as checkpoint:
                assert (checkpoint.named(weights_kind(checkpoint, None)), checkpoint.step) == (kind, 10)
                assert weights_kind(checkpoint, kind) == kind
                other = {"ema": "raw", "raw": "ema"}[kind]
                with pytest.raises(ConfigError, match=f"{folder}: holds the {kind.upper()} weights of iteration 10 "
                                                      f"alone; leave --weights {other} out"):
                    weights_kind(checkpoint, other)
    make_older(tmp_path / "raw2", iteration=0)
    with opened(tmp_path / "raw2") as checkpoint:
        assert checkpoint.named(weights_kind(checkpoint, None)) is None
    status, _, err = command("--weights", "ema", load=tmp_path / "raw2", load_format="hf", save="raw3")
    assert status == 1 and "holds weights of one kind and does not say of which; leave the flag out" in err


@pytest.mark.parametrize("save_format", ["megatron", "native"])
@pytest.mark.parametrize("kind, other", [("ema", "raw"), ("raw", "ema")])
def test_weights_alone_stay_what_they_are_in_every_format(command, tmp_path, save_format, kind, other):
    status, out, _ = command("--no-verify", "--weights", kind, save_format=save_format, save="alone")
    assert status == 0 and f"{kind} weights of iteration 10" in out
    alone = dict(load=tmp_path / "alone", load_format=save_format)
    status, out, _ = command("--no-verify", **alone, save="hf")
    assert status == 0 and f"{kind} weights of iteration 10" in out
    assert read_hf(tmp_path / "hf").origin == (kind, 10)
    status, out, _ = command("--no-verify", **alone, save="again", save_format="megatron")
    assert status == 0 and f"{kind} weights of iteration 10" in out
    assert read_megatron(find_iteration(tmp_path / "again")).origin == (kind, 10)
    status, _, err = command("--weights", other, **alone)
    assert status == 1 and f"holds the {kind.upper()} weights of iteration 10 alone; leave --weights {other} out" in err


@pytest.mark.parametrize("save_format", ["megatron", "native"])
def test_weights_of_which_nobody_says_the_kind_get_none_on_their_way(command, tmp_path, golden, save_format):
    assert command("--no-verify", load=golden / "hf_export" / "ema", load_format="hf", save_format=save_format,
                   save="alone")[0] == 0
    alone = dict(load=tmp_path / "alone", load_format=save_format)
    status, out, _ = command("--no-verify", **alone, save="hf")
    assert status == 0 and "the weights of iteration 0" in out and read_hf(tmp_path / "hf").origin == (None, 0)
    status, _, err = command("--weights", "ema", **alone, save="next")
    assert status == 1 and "does not say of which; leave the flag out" in err
    path = tmp_path / "alone" / EXPORT_FILE
    manifest = json.loads(path.read_text())
    del manifest["settings"]["weights"]
    make_older(tmp_path / "alone", iteration=7, settings=manifest["settings"])
    assert "the weights of iteration 7" in command("--no-verify", **alone, save="older")[1]
    if save_format == "megatron":
        path.unlink()
        assert read_megatron(find_iteration(tmp_path / "alone")).origin == (None, 0)


@pytest.mark.parametrize("save_format", ["megatron", "native"])
def test_a_run_in_a_folder_of_weights_alone_is_not_taken_for_them(command, tmp_path, save_format):
    assert command("--no-verify", "--weights", "raw", save_format=save_format, save="alone")[0] == 0
    assert command("--no-verify", save_format=save_format, save="run")[0] == 0
    shutil.copy(tmp_path / "alone" / EXPORT_FILE, tmp_path / "run")
    with opened(tmp_path / "run") as checkpoint:
        assert checkpoint.origin is None and checkpoint.has_state and checkpoint.step == 10


@pytest.mark.parametrize("save_format, flags", [("gguf", ["--dtype", "bfloat16"]), ("hf", ["--dtype", "bfloat16"]),
                                                ("megatron", []), ("native", [])])
def test_an_export_of_a_run_is_compared_whatever_it_becomes(command, save_format, flags, tmp_path):
    assert command("--no-verify")[0] == 0
    status, out, err = command(*flags, "--verify", load=tmp_path / "out", load_format="hf", save_format=save_format,
                               save="next")
    rounded = "those of the source rounded to bfloat16" if flags else "the source's"
    assert status == 0 and "ema weights of iteration 10" in out and f"its logits are {rounded} within" in out, err


@pytest.mark.parametrize("begins", ["before", "meanwhile"])
def test_a_folder_that_a_run_trains_into_stays(command, tmp_path, monkeypatch, begins):
    assert command("--no-verify", save_format="megatron")[0] == 0
    stock = run.write_hf
    with contextlib.ExitStack() as held:
        def begin(*arguments):
            held.enter_context(lock(tmp_path / "out" / LOCK_FILE, "the folder"))
            return stock(*arguments) if arguments else None

        if begins == "before":
            begin()
        else:
            monkeypatch.setattr(run, "write_hf", begin)
        status, _, err = command("--no-verify", "--overwrite")
        assert status == 1 and f"error: --save {tmp_path / 'out'} is in use by another run (process " in err
        assert find_iteration(tmp_path / "out").name == "iter_0000010" and _entries(tmp_path) == ["out"]
    monkeypatch.setattr(run, "write_hf", stock)
    assert command("--no-verify", "--overwrite")[0] == 0 and not (tmp_path / "out" / LOCK_FILE).exists()


def test_what_another_conversion_wrote_meanwhile_stays(command, tmp_path, monkeypatch):
    stock = run.write_hf

    def with_another(*arguments):
        monkeypatch.setattr(run, "write_hf", stock)
        assert command("--no-verify", save_format="megatron")[0] == 0
        return stock(*arguments)

    monkeypatch.setattr(run, "write_hf", with_another)
    status, _, err = command("--no-verify")
    assert status == 1 and "exists; pass --overwrite" in err
    assert find_iteration(tmp_path / "out") and _entries(tmp_path) == ["out"]


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
def test_a_config_that_transformers_would_refuse_is_one_line(command, tmp_path, verify):
    assert command("--no-verify")[0] == 0
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    make_older(tmp_path / "out")
    again = dict(load=tmp_path / "out", load_format="hf", save_format="megatron", save="m")
    path.write_text(json.dumps(config | dict(H_cycles=1.5)))  # of which int() would make another model
    assert command(verify, **again) == (1, "", f"error: {path}: H_cycles: 1.5 is no whole number; correct it, or copy "
                                               "the folder again\n")
    path.write_text(json.dumps(config | dict(attention_dropout="much")))  # which is not read here
    status, _, err = command(verify, **again)
    assert status == (verify == "--verify")
    assert not status or (f"error: {path}: transformers refuses it (" in err and err.count("\n") == 1)


def test_settings_of_sampling_that_are_lost_are_named(command, tmp_path):
    assert command("--no-verify")[0] == 0
    path = tmp_path / "out" / "generation_config.json"
    path.write_text(json.dumps(dict(eos_token_id=[11, 9], temperature=0.3, do_sample=True, top_k=None,
                                    transformers_version="5.24.0", _from_model_config=True)))
    status, out, _ = command("--no-verify", load=tmp_path / "out", load_format="hf", save="next")
    assert status == 0 and "; do_sample, temperature of its generation_config.json left out;" in out
    assert json.loads((tmp_path / "next" / path.name).read_text())["eos_token_id"] == [11, 9]
    path.write_text(json.dumps(dict(suppress_tokens=[5, 7])))  # of which nothing says why
    _, out, _ = command("--no-verify", load=tmp_path / "out", load_format="hf", save="last")
    assert "; suppress_tokens of its generation_config.json left out;" in out


def test_an_existing_output_stays_unless_told(command, tmp_path):
    assert command()[0] == 0
    (tmp_path / "out" / "marker").touch()
    status, _, err = command(save_format="native")
    assert status == 1 and err.startswith("error: --save ") and "pass --overwrite" in err and err.count("\n") == 1
    assert (tmp_path / "out" / "marker").exists()
    assert command("--overwrite", save_format="native")[0] == 0
    assert (tmp_path / "out" / "all_config.yaml").exists() and not (tmp_path / "out" / "marker").exists()
    assert _entries(tmp_path) == ["out"]


@pytest.mark.parametrize("name, content", [
    ("thesis.tex", ""), ("config.json", '{"name": "x"}'), ("config.json", '{"model_type": "llama"}'),
    ("config.json", "["), ("model.gguf", ""), ("all_config.yaml", "")])
def test_a_folder_of_something_else_is_never_replaced(command, tmp_path, name, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    status, _, err = command("--overwrite")
    assert status == 1 and "exists and is no checkpoint" in err and (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("save_format, own", [("hf", "config.json"), ("native", "all_config.yaml"),
                                              ("megatron", "latest_checkpointed_iteration.txt")])
def test_a_checkpoint_of_any_format_is_one_without_our_manifest(command, tmp_path, save_format, own):
    assert command("--no-verify", save_format=save_format)[0] == 0
    (tmp_path / "out" / EXPORT_FILE).unlink()
    assert run.is_checkpoint(tmp_path / "out")
    (tmp_path / "out" / own).unlink()
    assert not run.is_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("flag", ["--tokenizer-model", "--data-report", "--evaluation"])
def test_no_input_vanishes_with_the_old_output(command, tmp_path, flag):
    assert command("--no-verify")[0] == 0
    (tmp_path / "out" / "input").touch()
    status, _, err = command("--overwrite", flag, str(tmp_path / "out" / "input"))
    assert status == 1 and f"holds what {flag} reads (" in err and (tmp_path / "out" / "input").exists()


@pytest.mark.parametrize("failure, message", [
    (OSError(28, "No space left on device"), "cannot write (No space left on device); nothing was left there"),
    (KeyboardInterrupt(), None), (RuntimeError("bug"), None),
])
def test_a_failure_leaves_the_old_output_and_nothing_else(command, tmp_path, monkeypatch, failure, message):
    assert command()[0] == 0

    def fail(checkpoint, folder, *_):
        folder.mkdir(exist_ok=True)
        (folder / "half").touch()
        raise failure

    monkeypatch.setattr(run, "write_hf", fail)
    if message:
        status, _, err = command("--overwrite")
        assert status == 1 and message in err and err.count("\n") == 1
    else:
        with pytest.raises(type(failure)):
            command("--overwrite")
    assert _entries(tmp_path) == ["out"] and (tmp_path / "out" / "model.safetensors").exists()


def test_a_disk_too_small_is_refused_before_anything_is_written(command, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    status, _, err = command()
    needed, free = re.search(r"needs ([\d.]+) MB, ([\d.]+) MB are free; free some space", err).groups()
    assert status == 1 and float(needed) > float(free) == 1
    assert _entries(tmp_path) == []


@pytest.mark.parametrize("save_format", run.SAVE_FORMATS)
def test_a_quota_that_is_used_up_is_one_line_whoever_writes(command, tmp_path, monkeypatch, save_format):
    """Which statvfs does not know of: the disk has room."""
    if save_format == "gguf":
        pytest.importorskip("gguf")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # or modules would be cut short as the output is
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        status, out, err = command("--no-verify", save_format=save_format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, out, err) == (1, "", f"error: --save {tmp_path / 'out'}: cannot write (File too large); nothing "
                                         "was left there\n")
    assert _entries(tmp_path) == []


def test_damage_is_refused_before_there_is_an_output(command, tmp_path, golden):
    damaged = shutil.copytree(golden / "native_ckpt", tmp_path / "damaged")
    place = damaged / "fsdp2_epoch_1" / "__0_0.distcp"
    flip_bit_of_tensor(place)
    status, out, err = command(load=damaged, save_format="megatron")
    assert status == 1 and not out and err.count("\n") == 1 and f"error: {place}: " in err
    assert _entries(tmp_path) == ["damaged"]
    status, out, _ = command("--no-verify-checkpoint", load=damaged)
    assert status == 0 and f"from {damaged}, which was not verified (--no-verify-checkpoint)" in out


def test_a_damaged_iteration_names_the_one_that_is_not(command, tmp_path, golden):
    assert command(save_format="megatron", save="m")[0] == 0
    last = shutil.copytree(tmp_path / "m" / "iter_0000010", tmp_path / "m" / "iter_0000020")
    (last / "__0_0.distcp").unlink()
    status, _, err = command("--ckpt-step", "20", load=tmp_path / "m", load_format="megatron")
    assert status == 1 and "iter_0000020/__0_0.distcp: 0 bytes are there" in err
    assert err.endswith("; the newest that verifies: --ckpt-step 10\n")


def test_what_no_checksum_covers_is_said(command, tmp_path):
    assert "from " + str(tmp_path) not in command()[1]
    assert "which" not in command(load=tmp_path / "out", load_format="hf", save_format="native", save="n1")[1]
    (tmp_path / "out" / EXPORT_FILE).unlink()
    status, out, _ = command(load=tmp_path / "out", load_format="hf", save_format="native", save="n")
    assert status == 0 and "which has no checksums, so that its files were held against their headers only" in out
    assert "which" not in command(load=tmp_path / "n", load_format="native", save_format="megatron", save="m")[1]
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"garbage")
    status, _, err = command("--overwrite", load=tmp_path / "out", load_format="hf", save_format="native", save="n")
    assert status == 1 and f"error: {weights}: cannot read (" in err and err.count("\n") == 1


@pytest.mark.parametrize("flags, options, message", [
    ([], dict(load="nowhere"), "no fsdp2_epoch_N in it"),
    ([], dict(load="nowhere", load_format="megatron"), "latest_checkpointed_iteration.txt: cannot read"),
    ([], dict(load="nowhere", load_format="hf"), "config.json: cannot read"),
    (["--ckpt-step", "3"], dict(), "choose --ckpt-step from 1"),
    (["--ckpt-step", "3"], dict(load_format="hf"), "a transformers folder has no steps"),
    (["--tokenizer-model", "nowhere"], dict(), "no tokenizer there"),
    (["--dtype", "bfloat16"], dict(save_format="native"), "are for --save-format hf"),
    ([], dict(load=".", save="out"), "overlaps --load"),
])
def test_bad_input_is_one_line(command, tmp_path, monkeypatch, flags, options, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*flags, **options)
    assert status == 1 and not out
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert _entries(tmp_path) == []


def test_an_export_that_was_changed_is_told(command, tmp_path):
    assert command(save="m")[0] == 0
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    again = dict(load=tmp_path / "m", load_format="hf", save_format="megatron", save="again")
    status, _, err = command(**again)
    assert status == 1 and err.startswith(f"error: {path}: ") and "is not what was exported" in err
    assert _entries(tmp_path) == ["m"]
    status, out, _ = command("--no-verify-checkpoint", **again)
    assert status == 0 and "which was not verified" in out
    (tmp_path / "m" / EXPORT_FILE).write_text("{")
    status, _, err = command(save="third", load=tmp_path / "m", load_format="hf", save_format="native")
    assert status == 1 and f"error: {tmp_path / 'm' / EXPORT_FILE}: cannot read" in err and err.count("\n") == 1


def test_the_manifest_says_what_it_is_of(command, tmp_path, golden):
    assert command("--dtype", "bfloat16")[0] == 0
    manifest = json.loads((tmp_path / "out" / EXPORT_FILE).read_text())
    assert (manifest["source"], manifest["source_format"], manifest["format"], manifest["iteration"]) \
        == (str(golden / "native_ckpt"), "native", "hf", 10)
    assert manifest["settings"]["hidden_size"] == 24 and manifest["settings"]["dtype"] == "bfloat16"
    assert manifest["settings"]["weights"] == "ema"
    assert len(manifest["tensors"]) == 11
    assert command("--weights", "ema", save_format="megatron", save="m")[0] == 0  # which begins at step 0
    assert json.loads((tmp_path / "m" / EXPORT_FILE).read_text())["iteration"] == 10


def test_numbers_that_are_none_are_refused_or_told(command, tmp_path, monkeypatch):
    stock = run.read_native

    def broken(*arguments):
        source = stock(*arguments)
        return dataclasses.replace(source, read=lambda part, entry: source.read(part, entry) / 0
                                   if entry.hf == "lm_head.weight" else source.read(part, entry))

    monkeypatch.setattr(run, "read_native", broken)
    status, out, err = command()
    assert status == 1 and not out and "error: lm_head.weight: " in err and "pass --allow-nonfinite" in err
    assert _entries(tmp_path) == []
    status, out, _ = command("--allow-nonfinite")
    assert status == 0 and "warning: NaN or infinities in lm_head.weight" in out and "were not compared" in out
