"""Hold the two ways to read a piece against each other."""
from collections import Counter
from itertools import pairwise

import numpy as np

from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.example_batch import ExampleBatch
from hrm_megatron.data.preprocess import encode_chunk
from hrm_megatron.data.readers import pieces, read_piece
from tests.data.hostile import documents

PAIRS = [*pairwise([text for text in documents(600, 3) if text.strip()])]
PAIRS[9] = ("long " * 500, "b")
PAIRS[40:43] = ("\x0crac{1}", "lost \ufffd"), ("\u2060", "a"), ("same", " same\n")


def columns(batch):
    places = [batch.place(i) for i in range(len(batch.conditions))]
    return (places, batch.conditions, list(batch.texts), batch.texts.joined, batch.texts.ends.tolist(),
            list(batch.defaulted), [(number, str(row)) for number, row in batch.bad_rows])


def is_read_at_once(piece, rows=None):
    """Say whether a piece is read as columns, which must then be those of its rows one by one."""
    rows = rows or RowFormat()
    batch = piece.read_columns(rows)
    if batch is not None:
        noted = Counter()
        assert columns(batch) == columns(ExampleBatch.of(read_piece(piece, rows, noted))) and not noted, piece
    return batch is not None


def hold_both_ways(tokenizer, path, rows, monkeypatch):
    """Return what becomes of a file of PAIRS that is read as columns, after the same of its rows one by one."""
    (piece,) = pieces(path, rows=rows)
    assert piece.read_columns(rows)
    at_once = encode_chunk(tokenizer, piece, rows, 300)
    monkeypatch.setattr(type(piece), "read_columns", lambda *_: None)
    one_by_one = encode_chunk(tokenizer, piece, rows, 300)
    for name in ("ids", "lengths", "prompt_keys", "example_keys"):
        assert np.array_equal(getattr(at_once, name), getattr(one_by_one, name))
    assert [str(row) for row in at_once.bad_rows] == [str(row) for row in one_by_one.bad_rows] != []
    assert at_once.lint == one_by_one.lint and {"latex", "echo", "special"} <= at_once.lint.counts.keys()
    assert (at_once.truncated, at_once.defaulted, at_once.noted) == (
        one_by_one.truncated, one_by_one.defaulted, one_by_one.noted)
    return at_once
