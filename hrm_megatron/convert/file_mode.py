"""Apply the umask to files and folders that a library creates for their owner alone."""
from __future__ import annotations

import stat
import uuid
from pathlib import Path


def follow_umask(path: Path) -> None:
    """Give the new `path` the mode that an ordinarily created file or folder gets at its place.

    safetensors and tempfile create with 0600 and 0700, which hides a model from other users of a cluster. The mode is
    found by creating a probe: a process can read its umask only by changing it, and folders may have ACLs of their own.
    """
    probe = path.with_name(f".{path.name}.mode-{uuid.uuid4().hex}")
    folder = path.is_dir()
    try:
        if folder:
            probe.mkdir()
        else:
            probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        if folder:
            probe.rmdir()
        else:
            probe.unlink()
