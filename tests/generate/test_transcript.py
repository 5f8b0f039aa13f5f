"""Text while it grows: whole characters, nothing of a stop string, and in the end what a whole decode gives."""
import random

import pytest

from hrm_megatron.generate.transcript import Transcript

END = 300  # a token without text


def decode(tokens):
    return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


def grown(tokens, stop=(), max_new_tokens=1000):
    """The pieces of an answer of these tokens, and its transcript."""
    transcript, pieces = Transcript(frozenset({END}), max_new_tokens, stop, decode), []
    for token in tokens:
        pieces.append(transcript.push(token))
        if transcript.finish:
            break
    return pieces, transcript


@pytest.mark.parametrize("text", ["naïve – 你好 \N{SNOWMAN}", "\U0001f600\U0001f601", ""])
def test_pieces_are_whole_characters(text):
    pieces, transcript = grown([*text.encode(), END])
    assert pieces == [char if at == len(char.encode()) - 1 else "" for char in text
                      for at in range(len(char.encode()))] + [""]
    assert (transcript.text, transcript.finish) == (text, "stop")


def test_pieces_of_any_bytes_add_up_to_the_whole():
    rng = random.Random(3)
    alphabet = [*"aé你\U0001f600".encode(), 0xFF, 0xC0, 0x80]
    for _ in range(300):
        tokens = rng.choices(alphabet, k=12)
        pieces, transcript = grown(tokens, max_new_tokens=12)
        assert "".join(pieces) == transcript.text == decode(tokens) and transcript.finish == "length"


@pytest.mark.parametrize(("text", "stop", "want"), [
    ("one, two; three", (";",), "one, two"),
    ("aaab", ("aab",), "a"),
    ("abab abc", ("abc", "bx"), "abab "),
    ("say \n\nstop", ("\n\n",), "say "),
    ("both x and y", ("y", "x and"), "both "),
    ("stop", ("stop",), ""),
])
def test_an_answer_ends_before_a_stop_string(text, stop, want):
    pieces, transcript = grown(text.encode(), stop)
    assert ("".join(pieces), transcript.text, transcript.finish) == (want, want, "stop")
    assert len(transcript.tokens) == min(text.index(each) + len(each) for each in stop if each in text)


def test_what_only_begins_a_stop_string_is_held_back_and_then_given():
    pieces, transcript = grown(b"abcabx", ("abcd",), max_new_tokens=6)
    assert pieces == ["", "", "", "abc", "", "abx"] and transcript.finish == "length"
    pieces, transcript = grown([*b"ab", END], ("abc",))
    assert pieces == ["", "", "ab"] and transcript.finish == "stop"


def test_a_stop_token_has_no_text_and_a_last_token_is_told_apart():
    assert grown([END])[1].finish == "stop"
    assert grown([97, 98], max_new_tokens=2)[1].finish == "length"
    assert grown([97, END], max_new_tokens=2)[1].finish == "stop"
