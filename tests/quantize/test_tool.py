from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hrm_megatron.config import ConfigError
from hrm_megatron.convert.hf import read_hf, write_hf
from hrm_megatron.convert.low_bit import Scheme
from hrm_megatron.convert.quantization import Quantization
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.convert.table import table
from hrm_megatron.generate.load import opened
from hrm_megatron.generate.weights import take_weights
from hrm_megatron.quantize.job import Job
from hrm_megatron.quantize.recurrence import HEAD
from hrm_megatron.quantize.rounding import round_plainly
from hrm_megatron.quantize.run import Work
from tests.convert.records import make_older
from tests.stores import FakeTokenizer, write_store

needs_the_extra = pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None,
                                     reason="the extra quantize is not installed")
CALIBRATED = ("--calibration-rows", "6", "--tuning-steps", "2", "--micro-batch-size", "2")
LOADED_ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
types = torch.tensor([[1] * 6 + [0] * 4])
with torch.no_grad():
    logits = model(torch.arange(10)[None], token_type_ids=types).logits[0]
assert "hrm_megatron" not in sys.modules
torch.save(logits, sys.argv[2])
"""


@pytest.fixture
def quantized(tool, exported, tmp_path):
    """Quantize the export; return the folder."""
    def run(*arguments, name="small"):
        flags = ["--load", str(exported), "--save", str(tmp_path / name), *map(str, arguments)]
        assert tool(flags) == 0
        return tmp_path / name
    return run


def test_plain_rounding_is_read_back_with_its_sizes_and_its_manifest(quantized, weights, architecture):
    folder = quantized("--method", "rtn", "--no-verify", "--max-shard-size", "30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    quantization = Quantization(Scheme("int4", 64), Scheme("int8", 0))
    for entry in table(architecture):
        scheme = quantization.of(entry)
        expected = round_plainly(weights[entry.hf], scheme).dequantized() if scheme else weights[entry.hf]
        assert torch.equal(entry.from_megatron(read_hf(folder).read("raw", entry)).float(), expected)
    size = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened_file:
            size += sum(opened_file.get_tensor(name).nbytes for name in opened_file.keys())  # noqa: SIM118
    assert size == quantization.size_bytes(architecture)
    manifest = json.loads((folder / "conversion.json").read_text())
    assert manifest["settings"]["scheme"] == "int4 in groups of 64, int8 embedding"
    assert manifest["settings"]["method"] == "rtn" and manifest["settings"]["tokens_known"]
    assert "int4 in groups of 64, int8 embedding, by rtn" in (folder / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(folder)("a")["token_type_ids"] == [1]


def test_generation_takes_what_the_codes_stand_for(quantized, weights, architecture):
    folder = quantized("--method", "rtn", "--no-verify", "--scheme", "mxfp4", "--embedding", "keep")
    with opened(folder) as checkpoint:
        found = take_weights(checkpoint.architecture, checkpoint.weights("raw"))
    expected = round_plainly(weights[HEAD], Scheme("mxfp4", 32)).dequantized()
    assert torch.equal(found.head.dense.t(), expected[:architecture.vocab_size])
    assert torch.equal(found.embedding, weights["model.embed_tokens.weight"].bfloat16().float())


@pytest.mark.parametrize("save_format", ["megatron", "hf"])
def test_codes_that_transformers_computes_in_bfloat16_are_converted_as_what_they_stand_for(quantized, tmp_path,
                                                                                          single_rank, save_format):
    folder = quantized("--method", "rtn", "--no-verify", "--scheme", "mxfp4")
    said = convert(Conversion(folder, "hf", tmp_path / "converted", save_format, verify=True))
    difference = float(re.search("within (.*) of their norm", said)[1])
    assert difference < 1e-5  # of fp32 sums of 64 over 8 ticks; bfloat16 has 4e-3


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_codes_are_converted_without_the_program_that_transformers_reads_them_by(quantized, tmp_path, monkeypatch,
                                                                                 single_rank, scheme):
    folder = quantized("--method", "rtn", "--no-verify", "--scheme", scheme)
    monkeypatch.setattr("hrm_megatron.convert.comparison._of_transformers", None)
    said = convert(Conversion(folder, "hf", tmp_path / "converted", "megatron", verify=True))
    assert float(re.search("within (.*) of their norm", said)[1]) < 1e-5  # of fp32 sums of 64 over 8 ticks


@needs_the_extra
@pytest.mark.parametrize("flags", [("--scheme", "int8"), ("--scheme", "int4", "--embedding", "keep"),
                                   ("--scheme", "mxfp4", "--embedding", "keep")], ids=" ".join)
def test_transformers_computes_the_logits_of_what_the_codes_stand_for(quantized, capsys, flags):
    quantized("--method", "rtn", *flags)
    assert "its logits are those of its dequantized weights within" in capsys.readouterr().out


@needs_the_extra
def test_a_look_at_the_output_shows_no_lines_of_others(tmp_path, exported):
    tool = Path(__file__).parents[2] / "tools" / "quantize_checkpoint.py"
    done = subprocess.run([sys.executable, tool, "--load", exported, "--save", tmp_path / "small", "--method", "rtn"],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "its logits are those of its dequantized weights within" in done.stdout


@needs_the_extra
def test_a_calibrated_export_loads_in_unmodified_transformers_in_a_process_of_its_own(quantized, store, tmp_path,
                                                                                     single_rank, capsys):
    from hrm_megatron.generate.decode import next_token_logits
    from hrm_megatron.generate.load import load_model

    folder = quantized("--data-path", store, "--group-size", 32, *CALIBRATED)
    assert "6 rows of 48 positions, 2 steps of tuning" in capsys.readouterr().out
    subprocess.run([sys.executable, "-c", LOADED_ELSEWHERE, folder, tmp_path / "logits.pt"], check=True, cwd=tmp_path,
                   capture_output=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    ours = next_token_logits(load_model(read_hf(folder), "raw"), [[*range(6)]] * 5, [[*range(6, 6 + n)] for n in
                                                                                    range(5)])
    torch.testing.assert_close(theirs[5:], ours, rtol=0, atol=2e-5)  # of fp32 sums of 64 over 8 ticks
    again = quantized("--data-path", store, "--group-size", 32, *CALIBRATED, "--no-verify", name="again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@needs_the_extra
def test_an_export_of_a_run_is_quantized_and_converted_back(tool, exported, store, tmp_path, capsys, single_rank):
    run = shutil.copytree(exported, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | dict(L_bp_cycles=[0, 1])))
    (run / "conversion.json").write_text(json.dumps(dict(iteration=7, settings=dict(weights="ema", bp_max_steps=2),
                                                         tensors={})))
    for name, flags in (("plain", ["--method", "rtn"]),
                        ("calibrated", ["--data-path", store, "--tokenizer-model", str(run), *CALIBRATED])):
        assert tool(["--load", str(run), "--save", str(tmp_path / name), *flags]) == 0
        said = capsys.readouterr().out
        assert "ema weights of iteration 7" in said and "its logits are those of its dequantized weights within" in said
    assert read_hf(tmp_path / "plain").training.bp_max_steps == 2  # and not 3, of which the config would be the same
    said = convert(Conversion(tmp_path / "plain", "hf", tmp_path / "megatron", "megatron", verify=True))
    assert "ema weights of iteration 7" in said and "its logits are the source's within" in said


def test_a_table_compares_all_methods(tool, exported, store, capsys, tmp_path):
    assert tool(["--load", str(exported), "--data-path", store, "--compare", "--valid-data-path", store,
                 *CALIBRATED]) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert "int4 in groups of 64, int8 embedding; " in title and "increase" in header
    assert [row.split()[0] for row in rows] == ["before", "plain", "first", "all"]
    numbers = [[float(cell.rstrip("%")) for cell in row.split()[-4:]] for row in rows]
    assert numbers[0][1] == 0 and numbers[0][3] == 0
    for loss, increase, _, divergence in numbers[1:]:
        assert math.isclose(loss - numbers[0][0], increase, abs_tol=2e-4) and divergence > 0
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("nowhere", "STORE"), ("STORE", "nowhere"), ("nowhere", None)])
def test_a_dataset_is_refused_before_the_model_is_read(tool, exported, store, capsys, monkeypatch, tmp_path, names):
    monkeypatch.setattr("hrm_megatron.quantize.run.Quantizer", None)
    data, valid = (store if name == "STORE" else name for name in names)
    more = ["--compare", "--valid-data-path", valid] if valid else ["--save", str(tmp_path / "out"), "--no-verify"]
    assert tool(["--load", str(exported), "--data-path", data, *more]) == 1
    assert "error: nowhere.json missing; write the dataset" in capsys.readouterr().err


def test_flags_without_effect_are_refused(tool, exported, store, capsys):
    compare = ("--load", str(exported), "--data-path", store, "--compare", "--valid-data-path", store)
    for flags in (["--method", "rtn"], ["--overwrite"], ["--no-verify"], ["--max-shard-size", "1GB"]):
        assert tool([*compare, *flags]) == 1
        assert f"error: {flags[0].replace('no-', '')}: is about --save, which is not given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool(["--sizes", "--scheme", "int8"])
    assert "leave scheme out" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [
    ((), "--data-path: --method recurrent calibrates"),
    (("--method", "tick0", "--data-path", "nowhere"), "nowhere.json missing"),
    (("--method", "rtn", "--data-path", "STORE"), "--method rtn reads no data"),
    (("--data-path", "STORE", "--compare"), "--compare and --valid-data-path belong together"),
    (("--data-path", "OTHER"), "written with a tokenizer of 9000 entries, the model has"),
    (("--data-path", "FEWER"), "written with a tokenizer of 200 entries, the model has"),
    (("--data-path", "ALIKE", "--tokenizer-model", "TOKENIZER"), "was written with tokenizer ffffffffffff, not with "),
    (("--data-path", "ALIKE"), "was written with tokenizer ffffffffffff, not with "),  # but with that beside --load
    (("--method", "rtn", "--scheme", "mxfp4", "--dtype", "float32"), "transformers computes mxfp4 in bfloat16 alone"),
    (("--method", "rtn", "--max-shard-size", "0GB"), "--max-shard-size 0GB: no size of a file; write for example 5GB"),
    (("--method", "rtn", "--group-size", "128"), "rows of 64 weights are no multiple of the group size 128; choose "
                                                 "--group-size from [32, 64]"),
    (("--method", "rtn", "--scheme", "int8", "--group-size", "32"), "int8 has its own"),
    (("--data-path", "STORE", "--calibration-rows", "0"), "--calibration-rows 0: must be at least 1"),
    (("--data-path", "STORE", "--tuning-steps", "-1"), "--tuning-steps -1: must not be negative"),
    (("--data-path", "STORE", "--seq-length", "0"), "--seq-length 0: must be at least 1"),
    (("--data-path", "STORE", "--seed", "-1"), "--seed -1: must not be negative"),
    (("--method", "rtn", "--seed", "1234"), "--seed: --method rtn reads no data; leave the flag out"),
    (("--method", "tick0", "--data-path", "STORE", "--tuning-steps", "3"), "--tuning-steps: --method tick0 tunes "
                                                                           "nothing"),
    (("--method", "rtn", "--ckpt-step", "3"), "--ckpt-step 3: a transformers folder has no steps"),
])
def test_bad_settings_are_one_line_and_leave_nothing(tool, exported, store, tokenizer, tmp_path, capsys, flags,
                                                     message):
    named = dict(STORE=store, TOKENIZER=str(tokenizer.path))
    for name, tokens in (("OTHER", 9000), ("FEWER", 200), ("ALIKE", tokenizer.vocab_size)):
        named[name] = str(tmp_path / name)
        write_store(tmp_path / name, [([tokens - 1], [1])], FakeTokenizer(tokens))
    before = sorted(tmp_path.iterdir())
    assert tool(["--load", str(exported), "--save", str(tmp_path / "out"), "--no-verify",
                 *(named.get(flag, flag) for flag in flags)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_tokenizer_of_other_tokens_than_the_checkpoint_knows_is_refused(checkpoint_of, weights, tokenizer, exported):
    job = Job(exported, tokenizer_model=tokenizer.path)
    known = replace(checkpoint_of(weights), vocabulary=tokenizer.vocabulary)
    assert Work(job, known, "raw", print).tokenizer.path == tokenizer.path
    with pytest.raises(ConfigError, match="has other tokens than the tokenizer that random was trained with"):
        _ = Work(job, replace(known, vocabulary="others"), "raw", print).tokenizer


@pytest.mark.parametrize("known", [True, False])
def test_data_of_fewer_tokens_than_rows_are_taken_if_nobody_knows_the_number_of_tokens(
        checkpoint_of, weights, architecture, exported, store, tmp_path, known):
    source = replace(checkpoint_of(weights), counts_tokens=known, architecture=replace(architecture, vocab_size=1024))
    work = Work(Job(exported), source, "raw", print)
    with pytest.raises(ConfigError, match="entries, the model has 1024") if known else contextlib.nullcontext():
        assert len(work._rows(store, None))
    write_store(tmp_path / "more", [([1], [2])], FakeTokenizer(1025))
    with pytest.raises(ConfigError, match="written with a tokenizer of 1025 entries, the model has 1024"):
        work._rows(str(tmp_path / "more"), None)


def test_fp32_is_not_tf32(checkpoint_of, weights, exported):
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    try:
        Work(Job(exported), checkpoint_of(weights), "raw", print)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("flag", ["--tokenizer-model", "--data-path", "--valid-data-path"])
def test_no_input_vanishes_with_the_old_output(tool, quantized, exported, store, capsys, flag):
    folder = quantized("--method", "rtn", "--no-verify")
    given = {"--data-path": store, "--valid-data-path": store, flag: str(folder / "input")}
    assert tool(["--load", str(exported), "--save", str(folder), "--overwrite", "--compare", "--no-verify",
                 *(word for pair in given.items() for word in pair)]) == 1
    assert f"holds what {flag} reads ({folder / 'input'}" in capsys.readouterr().err


def test_a_tokenizer_that_nobody_named_and_that_says_nothing_of_itself_is_not_held_against_data(
        exported, tokenizer, checkpoint_of, weights, tmp_path):
    """That of an older export, and one without our control tokens, of which a comparison needs none."""
    said, store = [], str(tmp_path / "store")
    write_store(store, [([1], [2])], FakeTokenizer(tokenizer.vocab_size))
    older = shutil.copytree(exported, tmp_path / "older")
    (older / "tokenizer_info.json").unlink()
    foreign = shutil.copytree(older, tmp_path / "foreign")
    path = foreign / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|begin|>"))
    for folder in (older, foreign):
        for _ in range(2):
            work = Work(Job(folder), checkpoint_of(weights), "raw", said.append)
            assert len(work._rows(store, None)) and len(work._rows(store, None))
        assert said == [f"whether {store} is of the tokenizer beside --load was not checked, as that does not say "
                        "which it was made with; --tokenizer-model checks it"] * 2
        said.clear()
        named = Work(Job(folder, tokenizer_model=folder), checkpoint_of(weights), "raw", said.append)
        with pytest.raises(ConfigError, match="was written with tokenizer|special tokens missing"):
            named._rows(store, None)


@pytest.mark.parametrize("named", [True, False])
def test_a_tokenizer_that_no_export_takes_is_refused_before_the_work(tool, exported, store, tokenizer, tmp_path, capsys,
                                                                     monkeypatch, named):
    monkeypatch.setattr(Work, "compared", None)
    monkeypatch.setattr("hrm_megatron.convert.hf_tokenizer.QUESTIONS", ["<|im_end|>"])
    folder = shutil.copytree(exported, tmp_path / "in")
    assert tool(["--load", str(folder), "--save", str(tmp_path / "out"), "--data-path", store, "--compare",
                 "--valid-data-path", store, *(["--tokenizer-model", str(tokenizer.path)] if named else [])]) == 1
    assert "leave --tokenizer-model out (and remove tokenizer.json from the folder " in capsys.readouterr().err


def test_ends_of_an_answer_stay_and_other_settings_that_are_lost_are_named(tool, exported, tokenizer, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "in")
    path = folder / "generation_config.json"
    ends = [tokenizer.eoa, 9]
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(eos_token_id=ends, temperature=0.3)))
    assert tool(["--load", str(folder), "--save", str(tmp_path / "out"), "--method", "rtn", "--no-verify"]) == 0
    assert "; temperature of its generation_config.json left out; " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / path.name).read_text())["eos_token_id"] == ends


def test_a_comparison_knows_data_of_another_tokenizer(tool, exported, tokenizer, store, tmp_path, capsys):
    write_store(tmp_path / "other", [([1], [2])], FakeTokenizer(tokenizer.vocab_size))
    assert tool(["--load", str(exported), "--data-path", store, "--compare", "--valid-data-path",
                 str(tmp_path / "other"), "--tokenizer-model", str(tokenizer.path)]) == 1
    assert f"{tmp_path / 'other'} was written with tokenizer ffff" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra(tool, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hrm_megatron.quantize.job.find_spec", lambda name: None)
    assert tool(["--load", str(exported), "--save", str(tmp_path / "out"), "--method", "rtn"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'hrm_megatron[quantize]'" in error and error.count("\n") == 1


def test_existing_output_stays_and_quantized_input_is_refused(tool, quantized, exported, tmp_path, capsys):
    folder = quantized("--method", "rtn", "--no-verify")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert tool(["--load", str(exported), "--save", str(folder), "--method", "rtn", "--no-verify"]) == 1
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert tool(["--load", str(folder), "--save", str(tmp_path / "twice"), "--method", "rtn", "--no-verify"]) == 1
    assert "is quantized already; give the checkpoint that it was made from" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("value, said", [
    (float("nan"), "1 numbers of {} are NaN or infinite; choose an earlier checkpoint"),
    (-3.4e38, "{} holds 3.4e+38, too much to be rounded; choose an earlier checkpoint")], ids=["nan", "huge"])
@pytest.mark.parametrize("method", ["rtn", "recurrent"])
def test_numbers_that_no_code_stands_for_are_refused_by_name(tool, checkpoint_of, weights, store, tmp_path, capsys,
                                                            method, value, said):
    name = "model.L_module.layers.1.mlp.down_proj.weight"
    bad = weights[name].clone()
    bad[3, 5] = value
    write_hf(checkpoint_of(weights), tmp_path / "hf", "raw")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    save_file({**tensors, name: bad}, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "conversion.json").unlink(missing_ok=True)
    data = () if method == "rtn" else ("--data-path", store)
    assert tool(["--load", str(tmp_path / "hf"), "--save", str(tmp_path / "out"), "--method", method, "--no-verify",
                 *data]) == 1
    assert said.format(name) in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_widths_without_a_group_size_are_sent_to_int8(architecture):
    odd = replace(architecture, ffn_hidden_size=40)
    with pytest.raises(ConfigError, match=r"down_proj.*rows of 40 weights .* choose --scheme int8"):
        Quantization(Scheme("mxfp4", 32)).check(table(odd))


def test_folders_of_another_make_and_damaged_ones_are_refused(quantized):
    folder = quantized("--method", "rtn", "--no-verify")
    config = json.loads((folder / "config.json").read_text())
    given = config["quantization_config"]
    make_older(folder)
    given["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantization_config: 'compressed-tensors' of a kind that .* does not write"):
        read_hf(folder)
    given["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    written = {**given, "kv_cache_scheme": None, "config_groups": {
        name: {**group, "input_activations": None} for name, group in given["config_groups"].items()}}
    for status, said in (("compressed", None), ("decompressed", r"quantization_status: 'decompressed' .*without the "
                                                                "codes; give the folder that it had loaded")):
        written["quantization_status"] = status
        (folder / "config.json").write_text(json.dumps(config | dict(quantization_config=written)))
        with pytest.raises(ConfigError, match=said) if said else contextlib.nullcontext():
            read_hf(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    (folder / "conversion.json").unlink()
    name = f"{HEAD}_scale"
    save_file({**tensors, name: tensors[name].float()}, folder / "model.safetensors")
    checkpoint = read_hf(folder)
    with pytest.raises(ConfigError, match="lm_head.weight_scale: is torch.float32, not the torch.bfloat16 of int4"):
        dict(checkpoint.weights("raw"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="tensors missing: lm_head.weight_scale"):
        read_hf(folder)
