"""A process that reads data and is killed is named in one line, however torch hears of it."""
from __future__ import annotations

import os
import re
import signal

import pytest
import torch

from hrm_megatron.training.error_file import one_line


class Deadly(torch.utils.data.Dataset):
    """Rows that kill who reads them; none is handed over, for which the reader may wait in other code of torch."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_named():
    with pytest.raises(RuntimeError) as error:
        list(torch.utils.data.DataLoader(Deadly(), num_workers=1, multiprocessing_context="fork"))
    assert re.match(r"error: rank 3: DataLoader worker \(pid.* \d+\).*; a process that reads data was killed, .* "
                    "with fewer --num-workers", one_line(error.value, 3))
    assert one_line(RuntimeError("no worker"), 3) is None


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_rows_over_is_named(error, monkeypatch):
    def get(*_, **__):
        raise error
    batches = iter(torch.utils.data.DataLoader(range(4), num_workers=1, multiprocessing_context="fork"))
    monkeypatch.setattr(batches._data_queue, "get", get)
    with pytest.raises(type(error)) as found:
        next(batches)
    monkeypatch.undo()  # the workers end as ever
    assert re.match(r"error: rank 0: .*(reset by peer|EOFError); a process that reads data was killed",
                    one_line(found.value, 0))
    assert one_line(type(error)(), 0) is None  # of another connection
