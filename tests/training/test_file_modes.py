"""A run's checkpoints and logs are as open as the umask says; other umasks: tests/demo and tests/examples."""
from __future__ import annotations

from tests.modes import wrong_modes


def test_checkpoints_and_logs_of_a_run(uninterrupted):
    assert (uninterrupted / "checkpoints" / "iter_0000024" / "metadata.json").exists()
    assert not wrong_modes(uninterrupted, 0o022)
