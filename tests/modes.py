"""Which files and folders are not as open as a umask says."""
from __future__ import annotations

import stat
from pathlib import Path

UMASKS = (0o022, 0o027, 0o077)


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Name everything under `folder` that was made with another mode than under this umask: path > its mode."""
    found = {str(path.relative_to(folder)): (stat.S_IMODE(path.stat().st_mode), 0o777 if path.is_dir() else 0o666)
             for path in folder.rglob("*")}
    assert found
    return {path: f"{mode:o}" for path, (mode, full) in found.items() if mode != full & ~umask}
