import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from hrm_megatron.config import ConfigError
from hrm_megatron.data.batch import assemble_row
from hrm_megatron.data.sampled import SampledFolder
from tests.damage import zero_in_header

COLLATED = {"inputs": "tokens", "labels": "labels", "position_ids": "position_ids", "prefix_lens": "prefix_lengths",
            "causal_lens": "response_lengths"}


@pytest.fixture
def copy(golden, tmp_path):
    return shutil.copytree(golden / "sampled", tmp_path / "sampled")


@pytest.mark.parametrize("labels", ["", "_alltokens"])
def test_rows_equal_those_of_the_reference(golden, labels):
    """Its own packing and collation, element by element."""
    folder = SampledFolder(golden / "sampled")
    tensors = load_file(golden / f"collated_ws1_rank0{labels}.safetensors")
    runs = json.loads((golden / "multipack_ws1.json").read_text())["runs"]
    batches = {run["epoch"]: run["batches_by_rank"][0] for run in runs
               if run["batch_max_length"] == 96 and run["drop_last_batch"]}
    keys = sorted({name.rpartition(".")[0] for name in tensors})
    assert keys == ["e0.b0", "e0.b1", "e0.b2", "e1.b0"]
    for key in keys:
        epoch, batch = int(key[1]), int(key[4:])
        row = assemble_row([folder.example(epoch, i) for i in batches[epoch][batch]], 96,
                           loss_on_prefix=bool(labels))
        for theirs, ours in COLLATED.items():
            np.testing.assert_array_equal(row[ours].numpy(), tensors[f"{key}.{theirs}"], err_msg=f"{key} {theirs}")


def test_sizes_are_the_reference_s(golden):
    folder = SampledFolder(golden / "sampled")
    assert (folder.epochs, folder.vocab_size, folder.context_size) == (2, 250, 48)
    totals = [sum(int(lengths.sum()) for lengths in folder.epoch_lengths(epoch)) for epoch in (0, 1)]
    stated = json.loads((golden / "sampled" / "metadata.json").read_text())["total_length"]
    assert abs(sum(totals) / 2 - stated) <= 0.5  # it stores the mean as an integer


def test_epochs_start_over_after_the_last(golden):
    folder = SampledFolder(golden / "sampled")
    for late, stored in ((2, 0), (5, 1)):
        for ours, theirs in zip(folder.example(late, 3), folder.example(stored, 3), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(folder.epoch_lengths(late), folder.epoch_lengths(stored))
    assert not np.array_equal(folder.epoch_lengths(0)[0], folder.epoch_lengths(1)[0])


@pytest.mark.parametrize("name, row, value, parts", [
    ("inst_start", 3, -1, ["inst_start.npy", "row 3", "value -1", "6942"]),
    ("resp_start", 5, 6942, ["resp_start.npy", "row 5", "value 6942", "tokens.npy"]),
    ("resp_start", 7, 2**63 - 1, ["row 7", str(2**63 - 1)]),
    ("inst_len", 2, 0, ["inst_len.npy", "row 2", "value 0 is empty"]),
    ("resp_len", 9, 0, ["resp_len.npy", "row 9", "value 0 is empty"]),
    ("resp_len", 4, -3, ["resp_len.npy", "row 4", "value -3"]),
    ("resp_len", 4, 2**63 - 1, ["resp_len.npy", "row 4", str(2**63 - 1)]),
    ("inst_len", 0, 40, ["row 0", "value 51", "48"]),
])
def test_bad_indices_name_file_row_and_value(copy, name, row, value, parts):
    path = copy / "epoch_1" / f"{name}.npy"
    array = np.load(path)
    array[row] = value
    if name == "inst_len" and value == 40:
        array_resp = np.load(copy / "epoch_1" / "resp_len.npy")
        array_resp[row] = 12
        np.save(copy / "epoch_1" / "resp_len.npy", array_resp)
    np.save(path, array)
    with pytest.raises(ConfigError) as refusal:
        SampledFolder(copy)
    message = str(refusal.value)
    assert "epoch_1" in message and "sample_tokenized.py" in message and "\n" not in message
    assert all(part in message for part in parts), message


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def shorten(path):
    np.save(path, np.load(path)[:-1])


@pytest.mark.parametrize("name, damage, message", [
    ("epoch_0/resp_len.npy", zero_in_header, "resp_len.npy: cannot read"),
    ("epoch_1/resp_len.npy", lambda path: path.unlink(), "resp_len.npy: cannot read .No such file"),
    ("tokens.npy", lambda path: path.unlink(), "tokens.npy: cannot read"),
    ("tokens.npy", truncate, "tokens.npy: cannot read"),
    ("tokens.npy", lambda path: path.write_bytes(b""), "tokens.npy: cannot read"),
    ("epoch_0/inst_len.npy", lambda path: np.save(path, np.array([{}] * 3), allow_pickle=True), "cannot read"),
    ("epoch_0/inst_len.npy", lambda path: np.save(path, np.load(path) * 1.0), "float64 of shape .206,., not a list"),
    ("epoch_0/inst_start.npy", shorten, "epoch_0: arrays of different lengths .*'inst_start': 205"),
    ("metadata.json", lambda path: path.unlink(), "metadata.json: No such file"),
    ("metadata.json", truncate, "metadata.json: no tokenizer_info"),
    ("metadata.json", lambda path: path.write_text('{"max_seq_len": 49}'), "KeyError.'tokenizer_info'"),
    ("epoch_0", shutil.rmtree, "epoch_0 missing"),
])
def test_damaged_folders_are_refused(copy, name, damage, message):
    damage(copy / name)
    with pytest.raises(ConfigError, match=message) as refusal:
        SampledFolder(copy)
    assert str(copy) in str(refusal.value) and "\n" not in str(refusal.value)


def test_empty_epochs_are_refused(copy):
    for path in (copy / "epoch_1").iterdir():
        np.save(path, np.empty(0, np.int64))
    with pytest.raises(ConfigError, match="epoch_1: no examples"):
        SampledFolder(copy)


def test_an_epoch_that_is_missing_in_between_is_refused(copy):
    (copy / "epoch_1").rename(copy / "epoch_2")
    with pytest.raises(ConfigError, match="epoch_1 missing"):
        SampledFolder(copy)


def users_of(folder, position):
    """(epoch, example) of all that hold this token."""
    found = set()
    for epoch in (0, 1):
        for part in ("inst", "resp"):
            start, length = (np.load(folder / f"epoch_{epoch}" / f"{part}_{what}.npy") for what in ("start", "len"))
            inside = (start <= position) & (position < start + length)
            found |= {(epoch, int(i)) for i in np.flatnonzero(inside)}
    return found


@pytest.mark.parametrize("epoch, part, name", [(0, "inst", "prefix"), (1, "resp", "target")])
@pytest.mark.parametrize("token", [250, 65_535, -1])
def test_an_id_outside_the_vocabulary_names_example_and_position(copy, monkeypatch, epoch, part, name, token):
    start, length = (np.load(copy / f"epoch_{epoch}" / f"{part}_{what}.npy") for what in ("start", "len"))
    position = int(start[np.flatnonzero(length > 3)[9]]) + 2
    tokens = np.load(copy / "tokens.npy").astype(np.int32)
    tokens[position] = token
    np.save(copy / "tokens.npy", tokens)
    users = users_of(copy, position)
    assert users
    for block in (1 << 22, 97):
        monkeypatch.setattr("hrm_megatron.data.vocabulary.BLOCK_TOKENS", block)
        with pytest.raises(ConfigError, match=f"token 2 of its {name} has the id {token}, but the vocab") as refusal:
            SampledFolder(copy)
        assert any(str(refusal.value).startswith(f"{copy}/epoch_{e}, example {i}: ") for e, i in users)


def test_what_no_example_uses_may_be_anything(copy):
    tokens = np.load(copy / "tokens.npy")
    np.save(copy / "tokens.npy", np.append(tokens, [60_000, 250]))
    assert SampledFolder(copy).epochs == 2
