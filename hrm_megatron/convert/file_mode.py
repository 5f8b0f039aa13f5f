"""Files and folders that a library makes for their owner alone, opened to whom the umask lets in."""
from __future__ import annotations

import stat
import uuid
from pathlib import Path


def follow_umask(path: Path) -> None:
    """Give `path`, which is new, the mode that its folder gives to what is made there in the ordinary way.

    safetensors and tempfile choose 0600 and 0700, which keeps a cluster's other users from a model. Something is made
    to see the mode: a process can only read its umask by changing it, and folders may have rules (ACLs) of their own.
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
