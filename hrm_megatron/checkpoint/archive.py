"""The zip archives of torch.save, concatenated in a file: locate them, and verify them.

torch stores a CRC32 with every entry but never checks it on reading.
"""
from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hrm_megatron.config import ConfigError

WAY_OUT = "copy the checkpoint again, or choose another with --ckpt-step"
BLOCK_BYTES = 1 << 20  # read at a time, however large a tensor is
# APPNOTE.TXT 4.3.7: signature, version, flags, method, time, date, CRC32, two sizes, lengths of name and extra field
HEADER = struct.Struct("<4s5H3L2H")
END_BYTES, END_SIGNATURE = 22, b"PK\5\6"
DESCRIPTOR_FLAG, DESCRIPTOR_BYTES = 8, (16, 24)  # follows the data; with sizes of 32 or 64 bits


class DamagedError(ConfigError):
    """Bytes of a checkpoint are missing or not those that were written."""


@contextlib.contextmanager
def naming(place: Path, what: str = "it") -> Iterator[None]:
    """Turn whatever the block raises into a DamagedError that names the file: over damaged bytes it may be anything."""
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        raise DamagedError(f"{place}: cannot read {what} ({error.strerror}); {WAY_OUT}") from error
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DamagedError(f"{place}: {what} is damaged ({reason}); {WAY_OUT}") from error


@dataclass(frozen=True)
class Archive:
    """One archive from `start` to `end` in a file, and its entries: name, start of the data, size and CRC32."""

    start: int
    end: int
    entries: tuple[tuple[str, int, int, int], ...]


class _UpTo(io.RawIOBase):
    """A view of a file that ends at `end`."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file, self.end = file, end

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.file.tell(), os.SEEK_END: self.end}[whence]
        if position < 0:
            raise OSError("before the file's first byte")
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self.end - self.file.tell())
        return self.file.read(rest if size < 0 else min(size, rest))


def read_archive(file: BinaryIO, end: int) -> Archive:
    """Read the central directory of the archive that ends at `end`, and check all local headers against it."""
    file.seek(max(0, end - END_BYTES))
    if not file.read(END_BYTES).startswith(END_SIGNATURE):
        raise zipfile.BadZipFile(f"no archive of torch.save ends at byte {end}")
    with zipfile.ZipFile(_UpTo(file, end)) as opened:
        infos, directory, comment = sorted(opened.infolist(), key=_place), opened.start_dir, opened.comment
    if comment or not infos or len({info.orig_filename for info in infos}) < len(infos):
        raise zipfile.BadZipFile(f"the directory of the archive that ends at byte {end} is not torch's")
    entries = []
    for info, next_place in zip(infos, [*map(_place, infos[1:]), directory], strict=True):
        file.seek(info.header_offset)
        signature, _, flags, method, _, _, _, _, _, name_bytes, extra_bytes = HEADER.unpack(file.read(HEADER.size))
        name = info.orig_filename.encode()
        start = info.header_offset + HEADER.size + name_bytes + extra_bytes
        rest = next_place - start - info.file_size
        whole = (signature == b"PK\3\4" and flags == info.flag_bits and method == info.compress_type == 0
                 and info.compress_size == info.file_size and file.read(name_bytes) == name
                 and rest in (DESCRIPTOR_BYTES if flags & DESCRIPTOR_FLAG else (0,)))
        if whole and rest:
            file.seek(start + info.file_size)
            whole = file.read(8) == b"PK\7\x08" + struct.pack("<L", info.CRC)
        if not whole:
            raise zipfile.BadZipFile(f"what is written before and behind {info.orig_filename!r} contradicts the "
                                     "archive's directory")
        entries.append((info.orig_filename, start, info.file_size, info.CRC))
    return Archive(infos[0].header_offset, end, tuple(entries))


def _place(info: zipfile.ZipInfo) -> int:
    return info.header_offset


def check_archive(file: BinaryIO, start: int, end: int) -> None:
    """Compare the data of all entries of the archive from `start` to `end` with their CRC32, block by block."""
    archive = read_archive(file, end)
    if archive.start != start:
        raise zipfile.BadZipFile(f"an archive begins at byte {archive.start}, not {start}")
    for name, place, size, expected in archive.entries:
        crc = 0
        for block in _blocks(file, place, size):
            crc = zlib.crc32(block, crc)
        if crc != expected:
            raise zipfile.BadZipFile(f"the {size} bytes of {name!r} do not have the CRC32 that was written with them")


def check_archive_file(path: Path) -> None:
    """Raise DamagedError unless the file is a single archive with intact data."""
    with naming(path), path.open("rb") as file:
        check_archive(file, 0, path.stat().st_size)


def archives(file: BinaryIO, size: int) -> Iterator[Archive]:
    """Yield the archives that fill a file of this size, from last to first."""
    while size:
        archive = read_archive(file, size)
        yield archive
        size = archive.start


def frame_digest(path: Path) -> str:
    """Hash all bytes of a file of archives except the data that CRC32s cover: few, however large the file is."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for archive in archives(file, path.stat().st_size):
            position = archive.start
            for _, start, size, _ in (*archive.entries, ("", archive.end, 0, 0)):
                for block in _blocks(file, position, start - position):
                    digest.update(block)
                position = start + size
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(file: BinaryIO, start: int, size: int) -> Iterator[memoryview]:
    """Yield a byte range of a file block by block, reusing one buffer."""
    block = memoryview(bytearray(min(size, BLOCK_BYTES)))
    file.seek(start)
    while size:
        count = file.readinto(block[:size])  # type: ignore[attr-defined]  # BinaryIO has it, its stub does not
        if not count:
            raise EOFError(f"ends {size} bytes early")
        yield block[:count]
        size -= count
