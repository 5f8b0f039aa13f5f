"""Detect what a text file really is by its contents: only UTF-8 is read, with or without a byte order mark."""
from __future__ import annotations

import codecs
from pathlib import Path

from hrm_megatron.config import ConfigError

BYTE_ORDER_MARK = codecs.BOM_UTF8.decode()
HEAD_BYTES = 1 << 16  # read to detect the kind of a file
WIDE_NULS = 4  # ASCII in UTF-16 or UTF-32 has a NUL among this many first bytes, UTF-8 has none
SHOWN_CHARS = 60
PANDAS = "convert it, for example with pandas: {}(...).to_json(..., orient='records', lines=True)"
SIGNATURES: tuple[tuple[bytes, str, str], ...] = (  # first bytes, kind of file, remedy
    (b"\x1f\x8b", "gzip", "unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unpack it with unzstd"),
    (b"BZh", "bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "xz", "unpack it with unxz"),
    (b"PK\x03\x04", "zip", "unpack it with unzip"),
    (b"PAR1", "Parquet", PANDAS.format("read_parquet")),
    (b"ARROW1", "Arrow", PANDAS.format("read_feather")),
    (b"\x93NUMPY", "a NumPy array", "write its rows as jsonl"),
)
WIDE = (  # longest first: UTF-32's byte order mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)


def convert_from(encoding: str) -> str:
    """Return the advice how to convert a file to UTF-8."""
    return f"convert it, for example with iconv -f {encoding} -t UTF-8"


def without_mark(line: bytes) -> bytes:
    """Strip whitespace and a UTF-8 byte order mark, which also occurs in mid-file, where files were joined."""
    return line.strip().removeprefix(codecs.BOM_UTF8).strip()


def decode(text: bytes, place: str) -> str:
    """Decode UTF-8 and drop its byte order mark; anything else is a ConfigError."""
    try:
        if b"\0" not in text[:WIDE_NULS]:
            return text.decode("utf-8-sig")
        reason = "holds NUL characters"
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
    what, way_out = _foreign(text) or (reason, convert_from("LATIN1"))
    raise ConfigError(f"{place}: not UTF-8 ({what}); {way_out}")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, which end only at \\n or \\r\\n: U+2028, form feeds and the like are text."""
    text = decode(path.read_bytes(), str(path)).replace("\r\n", "\n")
    lines = [line.removeprefix(BYTE_ORDER_MARK) for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def is_blank_jsonl(path: Path, head: bytes, whole: bool) -> bool:
    """Return whether a jsonl file that begins with `head` has no row; refuse other kinds of files, naming the kind."""
    lines = [stripped for line in head.split(b"\n") if (stripped := without_mark(line))]
    if foreign := _foreign(head) or _other_text(lines):
        raise ConfigError(f"{path}: {foreign[0]}, not jsonl (one JSON object per line, UTF-8); {foreign[1]}")
    return whole and not lines


def _foreign(head: bytes) -> tuple[str, str] | None:
    """Return what a file that is not UTF-8 is, and the remedy; None if it may be UTF-8."""
    for mark, name, way_out in SIGNATURES:
        if head.startswith(mark):
            return name, way_out
    for mark, encoding in WIDE:
        if head.startswith(mark):
            return encoding, convert_from(encoding)
    if b"\0" in head[:WIDE_NULS]:
        return "UTF-16 or a binary file", convert_from("UTF-16LE")
    return None


def _other_text(lines: list[bytes]) -> tuple[str, str] | None:
    """Return what a text that is not jsonl is, and the remedy. A single bad row, even the first, does not count."""
    if not lines:
        return None
    first, second = lines[0], lines[1] if len(lines) > 1 else b""
    if first.startswith(b"["):
        return "a JSON array", "convert it, for example with jq -c '.[]'"
    if first == b"{" and second.startswith(b'"'):
        return "JSON over several lines", "convert it, for example with jq -c ."
    if any(line.startswith(b"{") for line in lines):
        return None
    if first.startswith(b"<"):
        return "XML or HTML", "write its rows as jsonl"
    if any(delimiter in first for delimiter in (b",", b";", b"\t")):
        return "csv or the like", PANDAS.format("read_csv")
    return f"begins with {shown(first)}", "write its rows as jsonl"


def shown(value: object) -> str:
    """Return the repr of a value for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."
