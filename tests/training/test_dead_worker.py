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
