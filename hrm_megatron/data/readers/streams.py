"""Files as streams of bytes, decompressed on the way and never held completely in memory."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from hrm_megatron.config import ConfigError

CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by the magic bytes of a file
SKIPPABLE_FRAME = b"\x2a\x4d\x18"  # of Zstandard, after a byte 5x; parallel and seekable writers begin with one


@dataclass
class Stream:
    """The decompressed bytes of a file; `packed_bytes` is how far the file itself has been read."""

    path: Path
    codec: str | None
    raw: pa.NativeFile
    unpacked: pa.NativeFile

    @property
    def packed_bytes(self) -> int:
        return int(self.raw.tell())

    def blocks(self, num_bytes: int) -> Iterator[bytes]:
        """Yield all bytes, `num_bytes` at a time. A damaged or truncated file is a ConfigError that says where."""
        done = 0
        while True:
            try:
                block = self.unpacked.read(num_bytes)
            except OSError as error:
                if not self.codec:
                    raise
                way_out = ("pack it again without --long" if "too much memory" in str(error) else
                           "copy or pack it again")
                raise ConfigError(f"{self.path}: {self.codec} cannot be unpacked behind byte {done:,} of its contents "
                                  f"({error}); {way_out}") from error
            if not block:
                return
            done += len(block)
            yield block


def codec_of(head: bytes) -> str | None:
    """Return the codec of a file that begins with `head`; None if it is not compressed, or by another codec."""
    if head[1:4] == SKIPPABLE_FRAME and head[0] >> 4 == 5:
        return "zstd"
    return next((codec for mark, codec in CODECS.items() if head.startswith(mark)), None)


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    # pyarrow's streams: those of the zstandard package end silently where a file was truncated
    with open(path, "rb") as file:
        codec = codec_of(file.read(4))
    with pa.OSFile(str(path)) as raw:
        unpacked = pa.CompressedInputStream(raw, codec) if codec else raw
        with unpacked:
            yield Stream(path, codec, raw, unpacked)
