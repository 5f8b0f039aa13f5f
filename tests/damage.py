"""Damage that only a checksum sees, or that readers are not made for."""
from __future__ import annotations

from pathlib import Path

from hrm_megatron.checkpoint.archive import archives


def flip_bit_of_tensor(path: Path) -> None:
    """Change one bit of the largest tensor in a file of a checkpoint."""
    with path.open("r+b") as file:
        entries = [entry for archive in archives(file, path.stat().st_size) for entry in archive.entries
                   if "/data/" in entry[0]]  # not the pickled arguments of the run, which may be larger
        place = max(entries, key=lambda entry: entry[2])[1]
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))


def zero_in_header(path: Path) -> None:
    """Zero bytes of the header of a .npy file, over which numpy's reader raises an error of Python's tokenizer."""
    with path.open("r+b") as file:
        file.seek(40)
        file.write(bytes(4))
