"""Damage to what a dataset is made of is refused by name, or leaves what is read the same; none is silent."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.npy_file import UnreadableArray, load_array
from hrm_megatron.data.preprocess import preprocess
from tests.stores import examples_of, files_of

SEED = 5
DAMAGES, INPUT_DAMAGES = 120, 80
KINDS = ("bit", "byte", "cut", "longer", "zeros", "swapped", "gone")


def damage(path, kind, random):
    """Change a file; return whether it now holds something else."""
    data = bytearray(path.read_bytes())
    before = bytes(data)
    at = int(random.integers(len(data)))
    end = at + int(random.integers(1, 9))
    if kind == "gone":
        path.unlink()
        return True
    if kind == "bit":
        data[at] ^= 1 << int(random.integers(8))
    elif kind == "byte":
        data[at] = int(random.integers(256))
    elif kind == "cut":
        del data[at:]
    elif kind == "longer":
        data += bytes(random.integers(0, 256, end - at, np.uint8))
    elif kind == "zeros":
        data[at:end] = bytes(len(data[at:end]))
    elif kind == "swapped":
        data[at:end] = data[at:end][::-1]
    path.write_bytes(data)
    return bytes(data) != before


def read_all(prefix, verify):
    """Everything that is read of a dataset."""
    store = IndexedExamples(prefix)
    if verify:
        for block in store.blocks():
            block.verify()
    return ([tuple(part.tolist() for part in store[i]) for i in range(len(store))],
            [lengths.tolist() for lengths in store.lengths()], store.prompt_keys().tolist(),
            store.example_keys().tolist(), store.sources, store.metadata)


@pytest.fixture
def dataset(write_jsonl, tmp_path, tokenizer):
    paths = [write_jsonl(f"in/{name}.jsonl", [dict(condition="", instruction=f"What is {name} + {i}?",
                                                   response="y" * i + "!") for i in range(count)])
             for name, count in (("a", 7), ("b", 5))]
    preprocess(paths, tmp_path / "x", tokenizer)
    return tmp_path / "x"


def test_damages_to_a_dataset(dataset, tmp_path):
    random = np.random.default_rng(SEED)
    names = sorted(files_of(dataset))
    expected, refused, unverified = read_all(dataset, True), 0, 0
    for number in range(DAMAGES):
        for old in tmp_path.glob("copy*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        copy = tmp_path / "copy"
        shutil.copy(f"{dataset}.json", f"{copy}.json")
        shutil.copytree(f"{dataset}.shards", f"{copy}.shards")
        name = names[number % len(names)]
        path = Path(f"{copy}.json") if name.endswith(".json") else Path(f"{copy}.shards", name)
        changed = damage(path, KINDS[number % len(KINDS)], random)
        for verify in (True, False):
            try:
                found = read_all(copy, verify)
            except ConfigError as error:
                named = str(path) in str(error) or (f"{copy}, example " in str(error) and name.endswith(".bin"))
                assert named and "\n" not in str(error), error
                refused += verify
                unverified += not verify
            else:
                assert not (changed and verify) or (found == expected and name == "x.json"), (number, path)
                assert found == expected or not verify, (number, path)
    assert DAMAGES * 0.8 < refused <= DAMAGES and unverified < refused  # sizes alone do not see all


def test_damages_to_inputs_and_notes(write_jsonl, tmp_path, tokenizer):
    """A damaged row is refused by its place, or it is another row; a damaged note of a finished source is not used."""
    random = np.random.default_rng(SEED + 1)
    rows = [dict(condition="cot", instruction=f"What is {i} + 1?", response=f"{i + 1}!") for i in range(6)]
    refused = 0
    for number in range(INPUT_DAMAGES):
        path = write_jsonl("in/a.jsonl", rows)
        bad = write_jsonl("in/b.jsonl", ["{"])
        with pytest.raises(ConfigError, match="b.jsonl:1: broken JSON"):
            preprocess([path, bad], tmp_path / "x", tokenizer)
        note, = Path(f"{tmp_path}/x.shards").glob("source-*")
        damage(note if number % 2 else path, [kind for kind in KINDS if kind != "gone"][number // 2 % 6], random)
        try:
            preprocess([path], tmp_path / "x", tokenizer)
        except ConfigError as error:
            assert number % 2 == 0 and f"{path}" in str(error) and "\n" not in str(error), error
            refused += 1
        else:
            lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
            assert examples_of(tmp_path / "x") == [
                (tokenizer.encode_prefix(row["condition"], row["instruction"]),
                 tokenizer.encode_response(row["response"])) for row in lines], number
        shutil.rmtree(tmp_path / "x.shards")
        (tmp_path / "x.json").unlink(missing_ok=True)
    assert refused > INPUT_DAMAGES // 8


@pytest.mark.filterwarnings("ignore")  # numpy's, about headers of Python 2
def test_no_bit_of_the_header_of_an_array_raises_anything_else(tmp_path):
    np.save(tmp_path / "whole.npy", np.arange(20))
    whole, path = (tmp_path / "whole.npy").read_bytes(), tmp_path / "damaged.npy"
    refused = 0
    for bit in range(8 * (len(whole) - 20 * 8)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            load_array(path)
        except UnreadableArray as error:
            assert str(error).startswith(f"{path}: cannot read (") and "\n" not in str(error)
            refused += 1
    assert refused > 900
