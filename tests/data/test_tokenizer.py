import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from hrm_megatron.config import ConfigError
from hrm_megatron.data.spelling import BOQ, EOA, EOQ, SPECIAL_TOKENS, TAG_TOKENS
from hrm_megatron.data.tokenizer import MIN_VOCAB_SIZE, TextTokenizer, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def facts(golden):
    return json.loads((golden / "tokenizer" / "facts.json").read_text())


def test_special_tokens_and_tags_are_the_reference_s(facts, tokenizer):
    assert {token: i for i, token in enumerate(SPECIAL_TOKENS)} == facts["special_token_ids"]
    assert (facts["boq"], facts["eoq"], facts["eoa"]) == (BOQ, EOQ, EOA)
    assert facts["condition_mapping"] == TAG_TOKENS
    for token, i in facts["special_token_ids"].items():
        assert tokenizer.tokenizer.token_to_id(token) == i


def test_normalizer_and_split_are_the_reference_s(golden, tokenizer):
    ours, theirs = (json.loads(path.read_text()) for path in (tokenizer.path, golden / "tokenizer" / "tokenizer.json"))
    for part in ("normalizer", "pre_tokenizer", "added_tokens"):
        assert ours[part] == theirs[part]


def test_encodings_are_the_reference_s(golden, facts):
    tokenizer = TextTokenizer(golden / "tokenizer")
    for example in facts["encode_examples"]:
        ids = example["ids_specials_as_text"]
        assert tokenizer.encode_response(example["text"]) == [*ids, 11]
        assert tokenizer.encode_prefix("synth,direct", example["text"]) == [6, 13, 8, *ids, 7]
        assert tokenizer.encode_prefix("", example["text"]) == [6, *ids, 7]


def test_batch_encoding_keeps_the_order(tokenizer):
    conditions, texts = ["", "cot", "noisy, synth"], ["three", "four plus", "7"]
    assert tokenizer.encode_prefixes(conditions, texts) == [
        tokenizer.encode_prefix(condition, text) for condition, text in zip(conditions, texts, strict=True)]
    assert tokenizer.encode_responses(texts) == [tokenizer.encode_response(text) for text in texts]
    assert len({len(ids) for ids in tokenizer.encode_responses(texts)}) > 1


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_in_a_text_stay_text(tokenizer, token):
    ids = tokenizer.encode_response(f"a {token}{token} b")
    assert ids[-1] == 11 and min(ids[:-1]) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == f"a {token}{token} b"


@pytest.mark.parametrize("text", [
    "\u00e9t\u00e9 \u4f60\u597d", "tabs\t\r\n\n  two  spaces ", "\U0001f600\u0000\u07ff", "don't 2024"])
def test_characters_unseen_in_training_survive(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_response(text)) == text


def test_text_is_normalized(tokenizer):
    assert tokenizer.encode_response("e\u0301") == tokenizer.encode_response("\u00e9")


def test_training_is_deterministic_and_respects_the_size(tokenizer):
    texts = ["What is three plus four?", "three plus four is seven"] * 3
    assert train_tokenizer(texts, 300).to_str(pretty=True) == tokenizer.path.read_text()
    assert tokenizer.vocab_size == 300
    assert train_tokenizer(texts, MIN_VOCAB_SIZE).get_vocab_size() == MIN_VOCAB_SIZE == 287
    with pytest.raises(ConfigError, match="vocab_size=286.*287"):
        train_tokenizer(texts, MIN_VOCAB_SIZE - 1)


def test_pairs_seen_once_are_not_merged():
    once, twice = train_tokenizer(["abc"], 400), train_tokenizer(["abc", "abc"], 400)
    assert (once.get_vocab_size(), twice.get_vocab_size()) == (287, 289)


def test_transformers_loads_the_folder(tokenizer):
    theirs = AutoTokenizer.from_pretrained(tokenizer.path.parent)
    prompt = "What is <three>?"
    encoded = theirs(f"{BOQ}{TAG_TOKENS['cot']}{TAG_TOKENS['direct']}{prompt}{EOQ}")
    assert encoded["input_ids"] == tokenizer.encode_prefix("cot,direct", prompt)
    assert set(encoded["token_type_ids"]) == {1}
    pair = theirs("three", "four is seven")
    lengths = [len(tokenizer.encode_response(text)) - 1 for text in ("three", "four is seven")]
    assert pair["token_type_ids"] == [1] * lengths[0] + [0] * lengths[1]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (BOQ, EOA, "<|PAD|>")
    assert theirs.model_input_names == ["input_ids", "token_type_ids", "attention_mask"]


def test_tokenizer_info(tokenizer):
    info = json.loads((tokenizer.path.parent / "tokenizer_info.json").read_text())
    assert info == {"tokenizer_path": "small", "boq": BOQ, "eoq": EOQ, "eoa": EOA, "condition_mapping": TAG_TOKENS,
                    "vocab_size": 300}


def test_fingerprint_follows_the_contents(tokenizer, tmp_path):
    copy = tmp_path / "renamed.json"
    shutil.copy(tokenizer.path, copy)
    assert TextTokenizer(copy).fingerprint == tokenizer.fingerprint
    copy.write_text(copy.read_text() + "\n")
    assert TextTokenizer(copy).fingerprint != tokenizer.fingerprint


def test_unknown_tags_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="unknown tag 'cott' in condition 'direct,cott'; use direct, cot"):
        tokenizer.encode_prefix("direct,cott", "three")


def without_tokens(text, *tokens):
    contents = json.loads(text)
    contents["added_tokens"] = [token for token in contents["added_tokens"] if token["content"] not in tokens]
    return json.dumps(contents)


@pytest.mark.parametrize("change, message", [
    (lambda text: text[:-40], "not a tokenizer"),
    (lambda text: "{}", "not a tokenizer"),
    (lambda text: "\ufeff[", "not a tokenizer"),
    (lambda text: without_tokens(text, EOA, TAG_TOKENS["cot"]), rf"{EOA[:1]}.*box_end.*, .*object_ref_end"),
])
def test_damaged_tokenizers_are_refused(tokenizer, tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(change(tokenizer.path.read_text()))
    with pytest.raises(ConfigError, match=message) as refusal:
        TextTokenizer(tmp_path)
    assert str(path) in str(refusal.value) and "python tools/train_tokenizer.py" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_our_tokens_stay_text_where_a_tokenizer_does_not_call_them_special(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.path.read_text().replace('"special": true', '"special": false'))
    theirs = TextTokenizer(tmp_path)
    for token in SPECIAL_TOKENS:
        assert theirs.encode_response(f"a {token}") == tokenizer.encode_response(f"a {token}")


def of_model(model, tmp_path):
    """A tokenizer whose special tokens are ours and <unk>."""
    made = Tokenizer(model)
    words = isinstance(model, models.WordLevel)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if words else pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", *SPECIAL_TOKENS)])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


LETTERS = [*"\u2581abcdefghijklmnopqrstuvwxyz"]


@pytest.mark.parametrize("model", [
    models.Unigram([("<unk>", 0.0), *((token, 0.0) for token in SPECIAL_TOKENS), *((one, -2.0) for one in LETTERS)], 0),
    models.WordLevel({token: i for i, token in enumerate(["<unk>", *SPECIAL_TOKENS, "a"])}, unk_token="<unk>"),
])
def test_a_model_that_makes_special_tokens_of_text_is_refused(tmp_path, model):
    with pytest.raises(ConfigError, match=rf"its model, {type(model).__name__}, makes the special token of any text "):
        made = TextTokenizer(of_model(model, tmp_path))
        raise AssertionError(made.encode_response(f"a {EOA}"))


@pytest.mark.parametrize("model", [
    models.Unigram([("<unk>", 0.0), *((one, -2.0) for one in LETTERS)], 0),
    models.BPE({one: i for i, one in enumerate(["<unk>", *LETTERS])}, [], unk_token="<unk>"),
])
def test_what_a_model_does_not_know_may_become_its_token(tmp_path, model):
    made = TextTokenizer(of_model(model, tmp_path))
    *ids, eoa = made.encode_response(f"a{EOA}")
    assert eoa == made.eoa and made.eoa not in ids and made.special_ids["<unk>"] in ids


@pytest.mark.parametrize("name", ["nowhere", "nowhere/tokenizer.json", "."])
def test_missing_tokenizers_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="no tokenizer there .*python tools/train_tokenizer.py") as refusal:
        TextTokenizer(tmp_path / name)
    assert str(tmp_path) in str(refusal.value)


def test_a_tokenizer_that_loses_bytes_says_so(golden, caplog):
    TextTokenizer(golden / "tokenizer")
    alphabet = json.loads((golden / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    lost = len(set(pre_tokenizers.ByteLevel.alphabet()) - set(alphabet))
    assert f"{lost} of 256 bytes have no token" in caplog.text and lost > 0


def test_saving_replaces_only_tokenizers_and_only_when_told(tokenizer, tmp_path):
    folder = tmp_path / "new" / "folder"
    save_tokenizer(tokenizer.tokenizer, folder)
    with pytest.raises(ConfigError, match="already holds a tokenizer; pass --overwrite"):
        save_tokenizer(tokenizer.tokenizer, folder)
    other = train_tokenizer(["abcabc"] * 2, 300)
    save_tokenizer(other, folder, overwrite=True)
    assert TextTokenizer(folder).vocab_size == other.get_vocab_size() != tokenizer.vocab_size
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="thesis.txt.*choose another --output"):
        save_tokenizer(other, folder, overwrite=True)
    assert (folder / "thesis.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
