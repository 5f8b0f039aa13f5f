"""Rows come out of every kind of file with their places, in pieces, in bounded memory."""
import json
import pickle
from collections import Counter

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import BadRow, Example, RowFormat
from hrm_megatron.data.readers import pieces, read_piece

GOOD = {"condition": "direct", "instruction": "2 + 3?", "response": "5"}
ROWS = RowFormat()


def read(path, chunk_bytes=1 << 20, rows=ROWS):
    """Read all pieces of a file as workers do: each is sent and read by itself."""
    return [(place, example) for piece in pieces(path, chunk_bytes, rows)
            for place, example in read_piece(pickle.loads(pickle.dumps(piece)), rows, Counter())]


def said(read):
    return [(place, str(example) if isinstance(example, BadRow) else example) for place, example in read]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 10_000])
def test_pieces_cover_a_file_at_line_ends(tmp_path, chunk_bytes):
    contents = b"first\n\nthird line is longer\r\nfourth\nlast without end"
    (tmp_path / "a").write_bytes(contents)
    (tmp_path / "empty").write_bytes(b"")
    assert not list(pieces(tmp_path / "empty", chunk_bytes))
    parts = []
    for piece in pieces(tmp_path / "a", chunk_bytes):
        parts.append(contents[piece.start_byte:piece.start_byte + piece.num_bytes])
        assert piece.first_line == contents[:piece.start_byte].count(b"\n") + 1
    assert b"".join(parts) == contents
    assert all(part.endswith(b"\n") for part in parts[:-1])


@pytest.mark.parametrize("chunk_bytes", [50, 3_000, 1 << 20])
def test_a_line_that_is_too_long_is_a_bad_row_wherever_it_is_cut(write_jsonl, chunk_bytes):
    rows = RowFormat(max_characters=20)
    long = {**GOOD, "response": "x" * 200_000}
    path = write_jsonl("a.jsonl", [GOOD, long, GOOD, {**GOOD, "instruction": "y" * 21}, GOOD, long])
    places, examples = zip(*read(path, chunk_bytes, rows), strict=True)
    assert places == tuple(f"{path}:{number}" for number in range(1, 7))
    assert [examples[i] for i in (0, 2, 4)] == [Example(**GOOD)] * 3
    num_bytes = len(json.dumps(long))
    assert [(examples[i].kind, str(examples[i])) for i in (1, 5)] == [
        ("row too long", f"{path}:{i}: a line of {num_bytes:,} bytes, --max-characters 20 reads at most 65,776; split "
                         "it or raise that") for i in (2, 6)]
    assert str(examples[3]).startswith(f"{path}:4: instruction has 21 characters, --max-characters is 20; ")


def test_no_characters_at_all_are_refused():
    with pytest.raises(ConfigError, match="--max-characters 0: must be at least 1"):
        RowFormat(max_characters=0)
