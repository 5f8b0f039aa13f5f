"""Each rank reads its share of the data once, and all of them hear of damage."""
import logging

import pytest

from hrm_megatron.checkpoint.verify import share
from hrm_megatron.config import ConfigError
from hrm_megatron.data import shards
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.training.data_verification import verify_data
from tests.stores import part_of, write_store


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 64)
    write_store(tmp_path / "x", [([6, 40 + i, 7], [50 + i, 11]) for i in range(40)])
    return IndexedExamples(tmp_path / "x")


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_shares_cover_all_bytes_once(store, ranks):
    blocks = store.blocks()
    shares = [share(blocks, rank, ranks) for rank in range(ranks)]
    assert [block for own in shares for block in own] == blocks
    sizes = [sum(block.length for block in own) for own in shares]
    assert max(sizes) - min(sizes) <= 2 * 64  # a block more or less at either end


def test_a_verified_dataset_is_logged_and_a_damaged_one_refused(single_rank, store, caplog):
    with caplog.at_level(logging.INFO):
        verify_data([store, store])
    assert caplog.messages[-1].startswith("data: verified: 0.00 GB in ")
    path = part_of(store.prefix, "example_keys")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"{path}: bytes 576 to 640 are not what was written"):
        verify_data([store])
