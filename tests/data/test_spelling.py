"""Tokenizers of others, with control tokens of their own: every tool spells with what one folder says."""
import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.card import NO_SECTIONS, model_card
from hrm_megatron.convert.checkpoint import Checkpoint, Training
from hrm_megatron.convert.hf_tokenizer import ExportTokenizer
from hrm_megatron.data.dataset_folder import DatasetFolder
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.spelling import INFO_FILE, Spelling
from hrm_megatron.data.tokenizer import TextTokenizer
from tests.stores import files_of

TEXTS = ["\u0915\u0916 what is three", "wie viel ist drei <think>nothing</think>", "e\u0301 \u4f60\u597d 12"]
FLAGS = ["--boq", "<ask>", "--eoq", "<asked>", "--eoa", "<end>", "--tag", "kurz=<short>", "--tag", "direct=<plain>"]
TOKENS = ["<ask>", "<asked>", "<end>", "<short>", "<plain>", "<think>", "</think>", "<|im_end|>"]
LARGE = 131_072


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return tokenizer, trainer


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=300, show_progress=False, special_tokens=["[UNK]"])


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(vocab_size=100, show_progress=False, special_tokens=["<unk>"],
                                              unk_token="<unk>")


@pytest.fixture(scope="module", params=[byte_level, word_pieces, unigram])
def foreign(request, tmp_path_factory):
    """A tokenizer.json alone, not one of whose control tokens is ours; half of them are not even special."""
    tokenizer, trainer = request.param()
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.add_tokens([AddedToken(token, special=i % 2 == 0, normalized=False) for i, token in enumerate(TOKENS)])
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def write_rows(write_jsonl):
    return write_jsonl("rows.jsonl", [dict(condition="kurz" if i else "", instruction=text, response=text[::-1])
                                      for i, text in enumerate(TEXTS)])


def test_any_tokenizer_spells_with_the_tokens_that_are_named(foreign, write_jsonl, tmp_path, tool, capsys):
    rows, prefix = write_rows(write_jsonl), str(tmp_path / "x")
    arguments = ["--input", str(rows), "--output-prefix", prefix, "--tokenizer-model", str(foreign)]
    preprocess = tool("preprocess_data")
    assert preprocess(arguments) == 1
    assert "special tokens missing: <|im_start|>" in (refused := capsys.readouterr().err) and "--boq" in refused
    assert preprocess([*arguments, *FLAGS, "--control-tokens-in-text", "<think>"]) == 0
    folder = tmp_path / "x.tokenizer"
    assert f"{folder}: the tokenizer as these flags spell" in capsys.readouterr().out
    theirs = Tokenizer.from_file(str(foreign))
    ids = {token: theirs.token_to_id(token) for token in TOKENS}
    tokenizer, store = TextTokenizer(folder), IndexedExamples(prefix)
    store.check_tokenizer(tokenizer.fingerprint)
    for i, text in enumerate(TEXTS):
        question, answer = (part.tolist() for part in store[i])
        head = [ids["<ask>"]] + ([ids["<short>"]] if i else [])
        assert question[:len(head)] == head and question[-1] == ids["<asked>"] and answer[-1] == ids["<end>"]
        assert tokenizer.encode_prefix("kurz" if i else "", text) == question
        assert (question.count(ids["<think>"]), question.count(ids["</think>"])) == (text.count("<think>"), 0)
    for token in ("<ask>", "<asked>", "<end>", "<short>", "<plain>", "</think>", "<|im_end|>"):
        assert ids[token] not in tokenizer.encode_response(f"a{token} b")[:-1]
    with pytest.raises(ConfigError, match="unknown tag 'cot'.*use kurz, direct"):
        tokenizer.encode_prefix("cot", "a")


@pytest.mark.parametrize("more, said", [
    ({"tags": {"kurz": "<d>", "lang": "<d>"}}, "--tag lang=<d>: --tag kurz has that token too"),
    ({"tags": {"kurz": "<q>"}, "boq": "<q>"}, "--tag kurz=<q>: --boq has that token too"),
    ({"tags": {"kurz": "<e>"}, "eoq": "<e>", "eoa": "<e>"}, "--tag kurz=<e>: --eoa has that token too")])
def test_a_token_has_one_meaning(more, said):
    assert Spelling(**more).confused().startswith(said)
    assert Spelling(eoq="<e>", eoa="<e>").confused() is None  # behind a turn, whosoever


def test_a_tokenizer_that_was_made_with_two_tags_of_one_token_is_opened(tokenizer, write_jsonl, tmp_path, tool, caplog,
                                                                        capsys):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    info = Spelling(tags={"direct": "<think>", "cot": "<think>"}).to_info()
    (tmp_path / "theirs" / INFO_FILE).write_text(json.dumps(info))
    rows = write_jsonl("rows.jsonl", [dict(condition="cot", instruction="a", response="b")])
    arguments = ["--input", str(rows), "--output-prefix", str(tmp_path / "x"), "--tokenizer-model"]
    said = "--tag cot=<think>: --tag direct has that token too"
    assert tool("preprocess_data")([*arguments, str(tmp_path / "theirs")]) == 0
    assert len([line for line in caplog.messages if f"{INFO_FILE}: {said}" in line]) == 1
    flags = ["--tag", "direct=<think>", "--tag", "cot=<think>"]
    assert tool("preprocess_data")([*arguments, str(tokenizer.path), *flags]) == 1
    assert f"error: {said}" in (error := capsys.readouterr().err) and "give the tag a token of its own" in error


def test_exports_spell_as_the_data_was_spelled(foreign, write_jsonl, tmp_path, tool):
    rows, prefix = write_rows(write_jsonl), str(tmp_path / "x")
    assert tool("preprocess_data")(["--input", str(rows), "--output-prefix", prefix, "--tokenizer-model", str(foreign),
                                    *FLAGS, "--control-tokens-in-text", "<think>", "</think>"]) == 0
    tokenizer, out = TextTokenizer(tmp_path / "x.tokenizer"), tmp_path / "export"
    out.mkdir()
    export = ExportTokenizer.open(tmp_path / "x.tokenizer")
    export.write(out, 512)
    theirs = AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        want = tokenizer.encode_prefix("kurz", text)
        assert theirs(f"<ask><short>{text}<asked>")["input_ids"] == want
        assert theirs.apply_chat_template([dict(role="user", content=text)], condition="kurz",
                                          return_dict=True)["input_ids"] == want
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.boq, tokenizer.eoa)
    thought = tokenizer.encode_response(TEXTS[1])
    assert "<think>" in theirs.decode(thought, skip_special_tokens=True) and "<think>" in tokenizer.decode(thought)
    assert TextTokenizer(out).spelling == tokenizer.spelling == Spelling(
        "<ask>", "<asked>", "<end>", {"kurz": "<short>", "direct": "<plain>"}, ("<think>", "</think>"))
    unread = Checkpoint(tmp_path, Architecture(2, 24, 3, 40, 500), Training(), 0, 0, frozenset(), lambda *_: None)
    card = model_card(unread, "float32", export.pad_token, 0, tokenizer.spelling, NO_SECTIONS)
    assert "`<ask>`" in card and "`<short>` kurz" in card and "im_start" not in card


def test_a_repeated_command_keeps_its_tokenizer_and_refuses_another(foreign, write_jsonl, tmp_path, tool, capsys):
    arguments = ["--input", str(write_rows(write_jsonl)), "--output-prefix", str(tmp_path / "x"), "--tokenizer-model",
                 str(foreign), *FLAGS]
    preprocess = tool("preprocess_data")
    assert preprocess(arguments) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x.tokenizer").iterdir()}
    preprocess(arguments)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x.tokenizer").iterdir()} == before
    capsys.readouterr()
    assert preprocess([*arguments, "--eoq", "<|im_end|>"]) == 1
    error = capsys.readouterr().err
    assert "x.tokenizer already holds a tokenizer; pass --overwrite or choose another --output-prefix\n" in error


def test_a_dataset_keeps_its_tokenizer_until_another_dataset_is_there(tokenizer, write_jsonl, tmp_path, tool, capsys):
    def folder():
        return {path.name: path.read_bytes() for path in (tmp_path / "x.tokenizer").iterdir()}

    def run(*more):
        return tool("preprocess_data")(["--input", str(tmp_path / "rows.jsonl"), "--output-prefix", str(tmp_path / "x"),
                                        "--tokenizer-model", str(tokenizer.path), *more])
    row = dict(condition="", instruction="a", response="b")
    write_jsonl("rows.jsonl", [row])
    assert run("--eoa", "<|PAD|>") == 0
    before, dataset = folder(), files_of(tmp_path / "x")
    other = ["--overwrite", "--eoa", "<|quad_end|>", "--tag", "direct=<|cot|>"]
    with DatasetFolder(tmp_path / "x").held():
        assert run(*other) == 1
    assert run(*other, "--shard", "1/2") == 0 and folder() == before
    write_jsonl("rows.jsonl", ["{", row])
    assert run(*other) == 1 and "rows.jsonl:1: broken JSON" in capsys.readouterr().err
    assert folder() == before and files_of(tmp_path / "x") == dataset
    TextTokenizer(tmp_path / "x.tokenizer")
    write_jsonl("rows.jsonl", [row])
    assert run(*other, "--shard", "0/2") == 0 and folder() != before
    IndexedExamples(tmp_path / "x").check_tokenizer(TextTokenizer(tmp_path / "x.tokenizer").fingerprint)
    assert sorted(path.name for path in tmp_path.iterdir() if "tokenizer" in path.name) == ["x.tokenizer"]


@pytest.mark.parametrize("flags, message", [
    (["--control-tokens-in-text", "<|im_end|>"], "it marks where a question or an answer begins"),
    (["--control-tokens-in-text", "<nowhere>"], "special tokens missing: <nowhere>"),
    (["--tag", "short"], "--tag short: give NAME=TOKEN"),
    (["--tag", "a=<think>", "--tag", "a=</think>"], "name each once"),
    (["--tag", "a,b=<think>"], "'a,b': a tag's name has no comma"),
    (["--boq", "text"], "special tokens missing: text"),
])
def test_wrong_tokens_are_one_line(tokenizer, write_jsonl, tmp_path, tool, capsys, flags, message):
    rows = write_jsonl("rows.jsonl", [dict(condition="", instruction="a", response="b")])
    assert tool("preprocess_data")(["--input", str(rows), "--output-prefix", str(tmp_path / "x"), "--tokenizer-model",
                                    str(tokenizer.path), *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_spelling_changes_the_fingerprint(tokenizer):
    others = [Spelling(), Spelling(in_text=("<think>",)), Spelling(eoa="<|PAD|>")]
    assert len({TextTokenizer(tokenizer.path, spelling=spelling).fingerprint for spelling in others}) == len(others)
    assert TextTokenizer(tokenizer.path, spelling=Spelling()).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("text", ["{", "[]", '{"boq": "a"}',
                                  '{"boq": 1, "eoq": "", "eoa": "", "condition_mapping": {}}'])
def test_a_damaged_info_is_one_line(tokenizer, tmp_path, text):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    (tmp_path / INFO_FILE).write_text(text)
    with pytest.raises(ConfigError, match=f"{INFO_FILE}: .*copy the tokenizer's folder again"):
        TextTokenizer(tmp_path)


def test_a_large_vocabulary_is_stored_in_four_bytes(tokenizer, write_jsonl, tmp_path, tool):
    config = json.loads(tokenizer.path.read_text())
    size = len(config["model"]["vocab"])
    config["model"]["vocab"].update({f"unused {i}": i for i in range(size, LARGE - 1)})
    config["added_tokens"].append(dict(config["added_tokens"][0], id=LARGE - 1, content="<end>"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(config))
    rows = write_jsonl("rows.jsonl", [dict(condition="", instruction="three", response="four")])
    assert tool("preprocess_data")(["--input", str(rows), "--output-prefix", str(tmp_path / "x"), "--tokenizer-model",
                                    str(path), "--eoa", "<end>"]) == 0
    store = IndexedExamples(tmp_path / "x")
    prefix, target = store[0]
    assert store.vocab_size == LARGE and target[-1] == LARGE - 1 and prefix.dtype == target.dtype == np.int32
