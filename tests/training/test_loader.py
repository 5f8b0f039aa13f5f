"""Megatron's loader over our rows: worker processes read what one process would, before the step asks for it."""
import multiprocessing
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hrm_megatron.parallel.cpu import activate

activate()

from megatron.training.datasets import data_samplers  # noqa: E402

from hrm_megatron.data.dataset import PackedRows  # noqa: E402
from hrm_megatron.data.sampled import SampledFolder  # noqa: E402
from tests.training.conftest import FULLBATCH  # noqa: E402

WORKERS, AHEAD = 2, 2  # the latter is torch's prefetch_factor, batches of each worker


class CountedRows(torch.utils.data.Dataset):
    """Rows, and how many were read in all processes."""

    def __init__(self, rows):
        self.rows, self.read = rows, multiprocessing.Value("i", 0)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        with self.read.get_lock():
            self.read.value += 1
        return self.rows[index]


@pytest.fixture
def loader(monkeypatch):
    def build(num_workers):
        rows = CountedRows(PackedRows(SampledFolder(FULLBATCH / "sampled"), 96, seed=1, num_rows=24))
        monkeypatch.setattr(data_samplers, "get_args", lambda: SimpleNamespace(
            micro_batch_size=2, global_batch_size=8, dataloader_type="single", num_workers=num_workers,
            hybrid_context_parallel=False, exit_signal_handler=False, full_validation=False))
        monkeypatch.setattr(data_samplers, "mpu", SimpleNamespace(
            get_data_parallel_rank=lambda: 0, get_data_parallel_world_size=lambda: 1))
        return data_samplers.build_pretraining_data_loader(rows, consumed_samples=4), rows
    return build


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # that there is no accelerator to pin for
def test_workers_read_ahead_what_one_process_reads(loader):
    (ahead, counted), (plain, _) = loader(WORKERS), loader(0)
    assert ahead.pin_memory
    batches, wanted = iter(ahead), list(plain)
    found = [next(batches)]
    deadline = time.monotonic() + 60
    while counted.read.value < 2 * WORKERS * AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counted.read.value >= 2 * WORKERS * AHEAD  # rows of the micro-batches that nobody has asked for yet
    found += batches
    assert len(found) == len(wanted) == 10
    for have, want in zip(found, wanted, strict=True):
        assert have.keys() == want.keys()
        assert all(np.array_equal(have[name], want[name]) for name in want)
