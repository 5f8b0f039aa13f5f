import json
import logging
import random
import unicodedata
from importlib import metadata

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from hrm_megatron.data import engine as engine_module
from hrm_megatron.data.engine import (
    PATTERNS,
    Disagreement,
    GigatokenEngine,
    TokenizersEngine,
    open_engine,
    unassigned,
    unsupported,
)
from hrm_megatron.data.spelling import SPECIAL_TOKENS, Spelling
from hrm_megatron.data.tokenizer import TextTokenizer, save_tokenizer, train_tokenizer
from tests.data.hostile import bordered, class_strings, code_points, documents

pytest.importorskip("gigatoken", reason="the fast engine is an extra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "tok"
    save_tokenizer(train_tokenizer(list(documents(3000, seed=1)), 4000), path)
    return path


@pytest.fixture(scope="module")
def engines(folder):
    both = [TextTokenizer(folder, name).engine for name in ("tokenizers", "gigatoken")]
    assert [type(engine) for engine in both] == [TokenizersEngine, GigatokenEngine]
    return both


def engines_of(config):
    tokenizer = Tokenizer.from_str(config)
    tokenizer.encode_special_tokens = True
    return TokenizersEngine(tokenizer), GigatokenEngine(tokenizer, json.loads(tokenizer.to_str()))


def assert_same(engines, texts):
    want, have = (engine.encode(texts) for engine in engines)
    assert have.ids.dtype == np.int32
    if have.lengths.tolist() != want.lengths.tolist() or not np.array_equal(have.ids, want.ids):
        raise AssertionError([text for text, a, b in zip(texts, want.rows(), have.rows(), strict=True) if a != b][:5])


@pytest.mark.parametrize("count, seed", [
    (4000, 2), pytest.param(100_000, 3, marks=pytest.mark.slow),  # tokenizers is slow
])
def test_ids_are_those_of_tokenizers(engines, count, seed):
    texts = list(documents(count, seed))
    before = engines[1].guarded
    for start in range(0, count, 5000):
        assert_same(engines, texts[start:start + 5000])
    guarded = engines[1].guarded - before
    assert 0 < guarded < count / 2, "some have code points of a later Unicode, most have none"


@pytest.mark.parametrize("longest", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_string_of_character_classes_is_cut_alike(folder, longest):
    pair = engines_of(bordered(Tokenizer.from_file(str(folder / "tokenizer.json"))))
    batch = list(class_strings(longest))
    for start in range(0, len(batch), 100_000):
        assert_same(pair, batch[start:start + 100_000])


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_code_point_that_passes_the_guard_has_one_class(folder, pattern):
    config = json.loads(bordered(Tokenizer.from_file(str(folder / "tokenizer.json"))))
    config["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    pair = engines_of(json.dumps(config))
    every = [c for c in code_points() if not unassigned([c])]
    assert len(every) > 30_000
    before = pair[1].guarded
    assert_same(pair, [f"a{c}a!{c}!1{c}\n{c}'{c}s" for c in every])
    # NFC may make another character of one, but of none that is refused.
    assert pair[1].guarded == before


def test_the_guard_catches_what_would_differ(folder):
    slow, fast = engines_of(bordered(Tokenizer.from_file(str(folder / "tokenizer.json"))))
    later = ["a\u088fa", "!\U00010940!", "a\U00016ea0a"]  # letters of a Unicode that only one of them knows
    trusted = fast._trusted([text.encode() for text in later]).rows()
    assert all(have != want for have, want in zip(trusted, slow.encode(later).rows(), strict=True))
    assert_same((slow, fast), later)
    assert fast.guarded == len(later)


def test_a_normal_form_of_this_python_is_one_of_tokenizers():
    nfc = normalizers.NFC()
    texts = [unicodedata.normalize("NFC", text) for text in documents(3000, seed=4)]
    assert [nfc.normalize_str(text) for text in texts if not unassigned([text])] == \
        [text for text in texts if not unassigned([text])]


def test_long_words_and_long_texts(engines):
    rng = random.Random(5)
    letters = "".join(rng.choices("abcdefghij", k=1 << 20))
    assert_same(engines, [letters, "=" * 70_000, " " * 70_000, "\n" * 5000, "e\u0301" * 9000, "\u4f60" * 20_000,
                          *(letters[:n] for n in (255, 256, 257, 4095, 4097, 65_537))])


def test_memory_stays_bounded(engines, monkeypatch):
    fast = engines[1]
    rng = random.Random(6)
    built = []
    build = fast._build
    monkeypatch.setattr(fast, "_build", lambda: built.append(1) or build())
    monkeypatch.setattr(engine_module, "resident_bytes", lambda: fast._memory + engine_module.CACHE_BYTES + 1)
    texts = [" ".join("".join(rng.choices("abcdefgh", k=9)) for _ in range(20)) for _ in range(50)]
    assert_same(engines, texts)
    assert built, "gigatoken's cache was not dropped"
    assert_same(engines, texts)


def test_a_disagreement_stops_the_run(folder, monkeypatch):
    fast = TextTokenizer(folder, "gigatoken").engine
    trusted = fast._trusted
    monkeypatch.setattr(fast, "_trusted", lambda texts: trusted([b"other"] * len(texts)))
    with pytest.raises(Disagreement, match="'three'.*--tokenizer-engine tokenizers"):
        fast.encode(["three"] * engine_module.CHECKED_TEXTS)


@pytest.mark.parametrize("engine", ["tokenizers", "gigatoken"])
@pytest.mark.parametrize("in_text", [(), ("<think>", "</think>")])
def test_special_strings_are_text_unless_asked_for(folder, engine, in_text):
    tokenizer = TextTokenizer(folder, engine, Spelling(in_text=in_text))
    for i, token in enumerate(SPECIAL_TOKENS):
        ids = tokenizer.encode_response(f"a {token}{token} e\u0301{token}")[:-1]
        held = [other for other in ids if other < len(SPECIAL_TOKENS)]
        assert held == ([i] * 3 if token in in_text else [])
    text = "<think>e\u0301 \u088f</think><think></think> <|im_end|>"
    assert_same((TextTokenizer(folder, spelling=Spelling(in_text=in_text)).engine, tokenizer.engine),
                [text, "", "<think>", "no token", text, "\u088f", "<<think>>"] * 3)


def test_tokens_that_cover_others_are_cut_as_tokenizers_cuts_them(folder):
    config = json.loads((folder / "tokenizer.json").read_text())
    last = max(config["model"]["vocab"].values())
    for content, special in (("[a]", True), ("]", False), ("[a][b]", False)):
        last += 1
        config["added_tokens"].append(dict(config["added_tokens"][0], id=last, content=content, special=special))
    assert_same(engines_of(json.dumps(config)), ["x[a]y", "[a][b]", "[a][b", "]][a]]", "[a] [b]"])


def change(path, value):
    def apply(config):
        *parents, last = path
        for key in parents:
            config = config[key]
        config[last] = value
    return apply


@pytest.mark.parametrize("alter, reason", [
    (change(["normalizer"], {"type": "NFKC"}), "normalizer is NFKC"),
    (change(["normalizer"], {"type": "Sequence", "normalizers": []}), "normalizer is Sequence"),
    (change(["pre_tokenizer"], None), "not one Split and ByteLevel"),
    (change(["pre_tokenizer"], {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always",
                                "split": True}), "not one Split and ByteLevel"),
    (change(["pre_tokenizer", "pretokenizers", 0, "pattern"], {"Regex": r"\s+"}), "another expression"),
    (change(["pre_tokenizer", "pretokenizers", 0, "behavior"], "Removed"), "another expression"),
    (change(["pre_tokenizer", "pretokenizers", 1, "add_prefix_space"], True), "ByteLevel changes"),
    (change(["model", "unk_token"], "!"), "not plain BPE (unk_token=!"),
    (change(["model", "ignore_merges"], True), "not plain BPE (ignore_merges"),
    (lambda config: config["added_tokens"][5].update(special=False, lstrip=True), "depend on what is around"),
])
def test_other_tokenizers_are_left_to_tokenizers(folder, caplog, alter, reason):
    config = json.loads((folder / "tokenizer.json").read_text())
    alter(config)
    caplog.set_level(logging.INFO)
    slow = Tokenizer.from_str(json.dumps(config))
    chosen = open_engine("auto", slow, config)
    assert isinstance(chosen, TokenizersEngine) and reason in caplog.text
    assert chosen.encode(["some text"]).rows() == [slow.encode("some text", add_special_tokens=False).ids]


@pytest.mark.parametrize("version, message", [(None, "not installed: pip install"), ("0.9.9", "0.9.9, and 0.10.0")])
def test_no_engine_and_another_one_are_a_line_in_the_log(folder, monkeypatch, caplog, version, message):
    def installed(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version
    monkeypatch.setattr(engine_module.metadata, "version", installed)
    caplog.set_level(logging.INFO)
    for choice, level in (("auto", logging.INFO), ("gigatoken", logging.WARNING)):
        caplog.clear()
        assert isinstance(TextTokenizer(folder, choice).engine, TokenizersEngine)
        assert [record.levelno for record in caplog.records] == [level] and message in caplog.text
    caplog.clear()
    assert isinstance(TextTokenizer(folder, "tokenizers").engine, TokenizersEngine) and not caplog.records


def test_a_tokenizer_that_loses_bytes_is_not_for_gigatoken(golden):
    assert unsupported(json.loads((golden / "tokenizer" / "tokenizer.json").read_text())) == "some bytes have no token"
