"""What the converter and the tools for data write is as open as the umask says, under any umask."""
from __future__ import annotations

import os

import pytest

from hrm_megatron.config import Architecture
from hrm_megatron.convert.file_mode import follow_umask
from hrm_megatron.convert.hf import write_hf
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.data.preprocess import preprocess
from hrm_megatron.data.tokenizer_training import learn_tokenizer
from tests.modes import UMASKS, wrong_modes


@pytest.fixture(params=UMASKS, ids="{:03o}".format)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_format_that_the_converter_writes(umask, golden, tmp_path):
    for save_format in ("hf", "native", "megatron", "gguf"):
        convert(Conversion(golden / "native_ckpt", "native", tmp_path / "new" / save_format, save_format))
    assert (tmp_path / "new" / "megatron" / "iter_0000010" / "metadata.json").exists()
    assert not wrong_modes(tmp_path, umask)


def test_tokenizers_stores_and_sharded_exports(umask, tmp_path, random_checkpoint):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"condition": "direct", "instruction": "What is 2 + 3?", "response": "5"}\n' * 3)
    tokenizer = learn_tokenizer([rows], tmp_path / "tokenizer", 300)
    preprocess([rows], tmp_path / "stores" / "train", tokenizer)
    checkpoint = random_checkpoint(Architecture(1, 24, 3, 40, tokenizer.vocab_size))
    write_hf(checkpoint, tmp_path / "hf", tokenizer=tmp_path / "tokenizer", max_shard_size="30KB")
    assert len([*(tmp_path / "hf").glob("model-*.safetensors")]) > 1
    assert not wrong_modes(tmp_path, umask)


def test_what_was_made_for_its_owner_alone_is_opened(umask, tmp_path):
    (tmp_path / "file").touch(0o600)
    (tmp_path / "folder").mkdir(0o700)
    (tmp_path / "program").touch(0o755)
    for name in ("file", "folder", "program"):
        follow_umask(tmp_path / name)
    assert not wrong_modes(tmp_path, umask)
    assert len([*tmp_path.iterdir()]) == 3
