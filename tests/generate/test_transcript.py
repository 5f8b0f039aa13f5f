"""Text while it grows: whole characters, nothing of a stop string, and in the end what a whole decode gives."""
import itertools
import random

import pytest
from tokenizers import Tokenizer, decoders, models

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


DECODERS = {
    "Metaspace": decoders.Metaspace(),
    "Llama 2": decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                  decoders.Strip(" ", 1, 0)]),
    "WordPiece": decoders.WordPiece(cleanup=False),
}


@pytest.mark.parametrize("name", DECODERS)
def test_spaces_that_a_decoder_takes_from_the_beginning_of_a_text_are_there_within_it(name):
    """Pieces of all kinds in any order, also a special token, which has no text. Those that were given are not
    the answer's, but go before it."""
    pieces = ["\u2581a", "\u2581", "b", "##c", "d!", "<0xE4>", "<0xBD>", "<0xA0>", "\u4f60", "<s>"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = DECODERS[name]
    rng = random.Random(5)
    for count in range(200):
        groups = rng.choices([[0], [1], [2], [3], [4], [5, 6, 7], [8], [9]], k=8)
        tokens, given = ([*itertools.chain(*some)] for some in (groups, groups[:count % 4]))
        transcript = Transcript(frozenset({END}), len(tokens), (), tokenizer.decode)
        for token in given:
            transcript.give(token)
        for token in tokens[len(given):]:
            transcript.push(token)
        assert tokenizer.decode(given) + transcript.text == tokenizer.decode(tokens), tokens


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
