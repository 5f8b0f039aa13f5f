"""Which ranks a run that hangs waits for, from what ranks said last."""
from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from hrm_megatron.training.heartbeats import (
    FORWARD,
    GRADIENTS,
    READING,
    Beat,
    describe_hang,
    read_beats,
    silent_ranks,
    write_beat,
)


def said(*places):
    """What ranks in these (step, phase) said at two moments, all of them alive."""
    before = [Beat(rank, f"n{rank // 2}", 7, step, phase, 60.0) for rank, (step, phase) in enumerate(places)]
    return before, [replace(beat, count=9) for beat in before]


@pytest.mark.parametrize("places, silent", [
    ([(5, GRADIENTS), (5, READING), (5, GRADIENTS)], [1]),
    ([(5, GRADIENTS), (6, READING), (5, FORWARD)], [1]),  # reading waits for nobody, wherever others are
    ([(5, GRADIENTS), (5, GRADIENTS), (5, FORWARD)], [2]),
    ([(6, FORWARD), (5, GRADIENTS), (6, FORWARD)], [1]),
    ([(5, GRADIENTS)] * 3, []),
    ([(5, READING)] * 3, []),
])
def test_the_rank_that_others_wait_for(places, silent):
    assert silent_ranks(*said(*places)) == silent


def test_a_process_that_says_nothing_any_more_comes_first():
    before, now = said((5, GRADIENTS), (5, READING), (5, GRADIENTS), (5, GRADIENTS))
    now[2], now[3] = before[2], None
    assert silent_ranks(before, now) == [2, 3]
    assert describe_hang(before, now) == (
        "rank 2 on n1 does not answer, last heard of in step 5 in 'reduction of gradients': its process is stopped, "
        "dead, or held by code outside of Python; rank 3 has said nothing since the start; all others are in "
        "'reading data' of step 5 or 'reduction of gradients' of step 5")


def test_the_line_names_node_step_and_where_others_wait():
    assert describe_hang(*said((5, GRADIENTS), (5, GRADIENTS), (5, READING))) == (
        "rank 2 on n1 is silent since step 5 in 'reading data'; all others are in 'reduction of gradients' of step 5")
    before, now = said((5, GRADIENTS), (5, GRADIENTS))
    now[1] = replace(now[1], idle_seconds=63.0)
    assert describe_hang(before, now) == ("all 2 ranks are in 'reduction of gradients' of step 5, rank 1 on n0 for "
                                          "longest, 63 s")


def test_beats_are_read_as_written(tmp_path):
    beat = Beat(1, "n0", 3, 5, READING, 1.5)
    write_beat(tmp_path, beat)
    assert read_beats(tmp_path, 3) == [None, beat, None]


@pytest.mark.parametrize("stale, read", [(2, True), (3, False)])
def test_a_beat_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch, stale, read):
    """As NFS has it: the handle of a file over which another was renamed is stale."""
    beat, stock, left = Beat(0, "n0", 3, 5, READING, 1.5), Path.read_text, [None] * stale
    write_beat(tmp_path, beat)

    def read_text(path):
        if left:
            left.pop()
            raise OSError(errno.ESTALE, "Stale file handle")
        return stock(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    if read:
        assert read_beats(tmp_path, 1) == [beat]
    else:
        with pytest.raises(OSError, match="Stale"):
            read_beats(tmp_path, 1)
