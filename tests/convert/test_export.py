"""An export as its users meet it: batches, tokenizers of others, the card's own lines, and the way back."""
from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.config import Architecture, ConfigError, padded_vocab_size
from hrm_megatron.convert.card import Sections
from hrm_megatron.convert.checkpoint import EMA
from hrm_megatron.convert.hf import read_hf, token_ids_of, write_hf
from hrm_megatron.convert.hf_tokenizer import ExportTokenizer
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.to_megatron import write_megatron
from hrm_megatron.data.spelling import EOA, EOQ, SPECIAL_TOKENS, Spelling
from hrm_megatron.data.tokenizer import TextTokenizer, save_tokenizer, train_tokenizer
from hrm_megatron.generate.decode import generate
from hrm_megatron.generate.load import load_model
from hrm_megatron.parallel.single import single_rank
from tests.random_checkpoint import TOKENIZER

QUESTIONS = ["three", "What is three plus four?", "three plus", "What is What is four plus three plus three?"]
CARD_TOKENS = 7


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    save_tokenizer(train_tokenizer(["What is three plus four?"] * 3, 300), folder)
    return TextTokenizer(folder)


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint, tokenizer):
    """Weights as wide as those that training begins with: larger ones would blow rounding up to other answers."""
    wide = random_checkpoint(Architecture(2, 24, 3, 40, tokenizer.vocab_size))
    return dataclasses.replace(wide, read=lambda part, entry: wide.read(part, entry) * wide.architecture.input_std)


@pytest.fixture(scope="module")
def export(checkpoint, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    write_hf(checkpoint, folder, tokenizer=tokenizer.path)
    return folder


@pytest.fixture(scope="module")
def loaded(export):
    return AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export)


def of_ours(checkpoint, tokenizer, prompts, max_new_tokens):
    """Greedy answers of our own model with these weights, without the token that ends them."""
    with single_rank():
        answers = generate(load_model(checkpoint, EMA), prompts, tokenizer.eoa, tokenizer.vocab_size, max_new_tokens)
    return [[i for i in answer if i != tokenizer.eoa] for answer in answers]


def without_ends(model, output, prompt_tokens):
    ends = {model.generation_config.eos_token_id, model.generation_config.pad_token_id}
    return [[i for i in row if i not in ends] for row in output[:, prompt_tokens:].tolist()]


def test_a_padded_batch_answers_as_single_prompts_and_as_our_model(checkpoint, tokenizer, loaded):
    theirs, model = loaded
    prompts = [tokenizer.encode_prefix("cot", question) for question in QUESTIONS]
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    longest = max(map(len, prompts))
    texts = [f"<|im_start|><|object_ref_end|>{question}{EOQ}" for question in QUESTIONS]
    batch = theirs(texts, padding=True, return_tensors="pt")
    for row, prompt in enumerate(prompts):
        filled = [0] * (longest - len(prompt))
        assert batch["input_ids"][row].tolist() == [theirs.pad_token_id] * len(filled) + prompt
        assert batch["attention_mask"][row].tolist() == batch["token_type_ids"][row].tolist() \
            == filled + [1] * len(prompt)
    options = dict(max_new_tokens=6, do_sample=False)
    answers = without_ends(model, model.generate(**batch, **options), longest)
    singles = []
    for text in texts:
        single = theirs(text, return_tensors="pt")
        singles += without_ends(model, model.generate(**single, **options), single["input_ids"].shape[1])
    assert answers == singles == of_ours(checkpoint, tokenizer, prompts, 6)
    causal = {name: tensor for name, tensor in batch.items() if name != "token_type_ids"}
    assert without_ends(model, model.generate(**causal, **options), longest) != answers  # so the types matter here


def test_a_pair_is_a_prompt_and_its_answer(loaded, tokenizer):
    prompts, answers = ["three", "What is three"], ["four plus", "four"]
    pairs = loaded[0](prompts, answers, padding=True)
    for row, texts in enumerate(zip(prompts, answers, strict=True)):
        prompt, answer = (len(tokenizer.encode_response(text)) - 1 for text in texts)
        filled = len(pairs["input_ids"][row]) - prompt - answer
        assert pairs["token_type_ids"][row] == [0] * filled + [1] * prompt + [0] * answer
        assert pairs["attention_mask"][row] == [0] * filled + [1] * (prompt + answer)
    assert 0 in pairs["attention_mask"][0]


def renamed(folder, tokenizer, *names):
    """A tokenizer whose special tokens of these names are called otherwise."""
    text = tokenizer.path.read_text()
    for name in names:
        assert name in text
        text = text.replace(name, f"<|not {name[2:]}")
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text)
    return folder


@pytest.mark.parametrize("absent, named, chosen", [
    ((), None, "<|PAD|>"),
    (("<|PAD|>",), None, "<|endoftext|>"),
    (("<|PAD|>",), "<|PAD|>", "<|endoftext|>"),  # what its configuration names is not there
    (("<|PAD|>",), "!", "<|endoftext|>"),  # an ordinary token, which texts hold
    (("<|PAD|>", "<|endoftext|>"), None, EOA),
    ((), ["<|fim_pad|>"], "<|PAD|>"),  # no name
    ((), "<|fim_pad|>", "<|fim_pad|>"),
    ((), {"content": "<|fim_pad|>", "special": True}, "<|fim_pad|>"),
])
def test_the_pad_token_exists_and_is_the_same_everywhere(tmp_path, checkpoint, tokenizer, absent, named, chosen):
    folder = renamed(tmp_path / "other", tokenizer, *absent)
    if named:
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": named}))
    write_hf(checkpoint, tmp_path / "hf", tokenizer=folder)
    theirs, model = (kind.from_pretrained(tmp_path / "hf") for kind in (AutoTokenizer, AutoModelForCausalLM))
    expected = TextTokenizer(folder).special_ids[chosen]
    assert theirs.pad_token == chosen
    assert theirs.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id == expected
    assert len(theirs) == tokenizer.vocab_size  # nothing was added beyond the rows of the model
    assert f"`{chosen}`" in (tmp_path / "hf" / "README.md").read_text()
    batch = theirs(QUESTIONS, padding=True, return_tensors="pt")
    assert batch["input_ids"].eq(expected).any() and model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("config, message", [
    ("[", r"tokenizer_config\.json: cannot read .*give its tokenizer\.json alone"),
    ("\udc80", r"tokenizer_config\.json: cannot read"),
])
def test_a_damaged_tokenizer_config_is_named(tmp_path, checkpoint, tokenizer, config, message):
    folder = renamed(tmp_path / "other", tokenizer)
    (folder / "tokenizer_config.json").write_text(config, errors="surrogateescape")
    with pytest.raises(ConfigError, match=message):
        write_hf(checkpoint, tmp_path / "hf", tokenizer=folder)


def test_without_a_tokenizer_the_ids_are_of_hrm_text_if_the_model_has_them(tmp_path, random_checkpoint):
    write_hf(random_checkpoint(Architecture(1, 24, 3, 40, 12)), tmp_path / "hf")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "hf" / name).read_text())
        assert [values[f"{role}_token_id"] for role in ("pad", "bos", "eos")] == [0, 6, 11]
    with pytest.raises(ConfigError, match="has 11 tokens, eos_token_id would be 11; give its own .*--tokenizer-model"):
        write_hf(random_checkpoint(Architecture(1, 24, 3, 40, 11)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_tokenizer_of_another_model_is_refused_if_rows_would_do(tmp_path, random_checkpoint, tokenizer):
    """Both vocabularies are padded to the same rows; a model of which only the rows are known cannot tell."""
    other = Architecture(1, 24, 3, 40, tokenizer.vocab_size - 1)
    assert other.padded_vocab_size == padded_vocab_size(tokenizer.vocab_size)
    with pytest.raises(ConfigError, match=f"has {tokenizer.vocab_size} tokens, the model random was trained with "
                                          f"{tokenizer.vocab_size - 1}; give its own tokenizer"):
        write_hf(random_checkpoint(other), tmp_path / "hf", tokenizer=tokenizer.path)
    assert not (tmp_path / "hf").exists()
    padded = dataclasses.replace(other, vocab_size=other.padded_vocab_size)
    with pytest.raises(ConfigError, match=f"the model random was trained with {padded.vocab_size}; give its own"):
        write_hf(random_checkpoint(padded), tmp_path / "hf", tokenizer=tokenizer.path)
    unknown = dataclasses.replace(random_checkpoint(padded), counts_tokens=False)
    write_hf(unknown, tmp_path / "hf", tokenizer=tokenizer.path)


def test_padding_and_cuts_of_a_tokenizer_json_are_left_out(tmp_path, checkpoint, tokenizer):
    folder = renamed(tmp_path / "other", tokenizer)
    contents = json.loads((folder / "tokenizer.json").read_text())
    contents["truncation"] = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
    contents["padding"] = dict(strategy={"Fixed": 9}, direction="Right", pad_to_multiple_of=None, pad_id=1,
                               pad_type_id=1, pad_token="<|direct|>")
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    write_hf(checkpoint, tmp_path / "hf", tokenizer=folder)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(QUESTIONS[1])["input_ids"] == tokenizer.encode_prefix("", QUESTIONS[1])[1:-1]
    assert (theirs.padding_side, theirs.pad_token, theirs.pad_token_type_id) == ("left", "<|PAD|>", 0)
    assert theirs.model_max_length == checkpoint.training.seq_length


def run_card(folder, monkeypatch):
    """Run the card's lines in its folder, for fewer tokens, and return what they leave."""
    monkeypatch.chdir(folder)
    [lines] = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    assert lines.count("max_new_tokens=100") == 1
    names: dict = {}
    exec(lines.replace("max_new_tokens=100", f"max_new_tokens={CARD_TOKENS}"), names)
    return names


def test_the_card_says_how_to_ask(export, checkpoint, tokenizer, monkeypatch, capsys):
    left = run_card(export, monkeypatch)
    prompts = [tokenizer.encode_prefix("direct", text) for text in ("What is 2 + 3?", "What is seven times eight?")]
    expected = [tokenizer.decode(answer) for answer in of_ours(checkpoint, tokenizer, prompts, CARD_TOKENS)]
    assert left["answers"] == expected and str(expected) in capsys.readouterr().out
    card = (export / "README.md").read_text()
    assert "Pass `token_type_ids`" in card and f"{checkpoint.architecture.num_parameters:,} parameters" in card
    assert card.startswith("---\nlibrary_name: transformers\n") and "{" not in card.replace("{question}", "")
    assert "Without `token_type_ids` a prompt is causal" in card and "trust_remote_code=True" in card
    assert "**Neither `save_pretrained` nor\n`Trainer` copies `custom_generate`**" in card
    for name, value in (("hidden_size", 24), ("l_cycles", 3), ("steps", 7), ("tokens_per_step", 96)):
        assert f"| `{name}` | {value} |" in card
    assert "## Data" not in card and "## Evaluation" not in card


def test_the_card_has_what_is_known_of_the_data_and_of_the_model(checkpoint, tmp_path):
    (tmp_path / "report.md").write_text("# numbers\n\n![a picture](numbers.png)\n\n7 examples\n")
    (tmp_path / "eval.md").write_text("| task | exact |\n|---|---|\n| sums | 0.5 |\n")
    sections = Sections.read(tmp_path / "report.md", tmp_path / "eval.md")
    write_hf(checkpoint, tmp_path / "hf", sections=sections)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "## Data\n\n### numbers\n\n7 examples\n\n## Evaluation\n\n| task | exact |" in card and "png" not in card


def test_the_card_of_a_model_alone_says_how_to_ask_with_ids(golden, tmp_path, monkeypatch):
    write_hf(read_hf(golden / "hf_export" / "ema"), tmp_path / "hf", "raw")
    left = run_card(tmp_path / "hf", monkeypatch)
    assert left["inputs"]["token_type_ids"].tolist() == [[1]] == left["inputs"]["attention_mask"].tolist()
    [answer] = left["answers"]
    assert 0 < len(answer) <= CARD_TOKENS
    assert "padded" not in (tmp_path / "hf" / "README.md").read_text()


def test_an_export_that_transformers_saved_again_comes_back(export, checkpoint, loaded, tmp_path):
    theirs, model = loaded
    for dtype, size in ((torch.float32, "5GB"), (torch.bfloat16, "30KB")):
        model = AutoModelForCausalLM.from_pretrained(export, dtype=dtype)
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        theirs.save_pretrained(tmp_path / size)
        again = read_hf(tmp_path / size)
        assert again.architecture == checkpoint.architecture  # the number of tokens too
        assert again.training.bp_max_steps == checkpoint.training.bp_max_steps
        expected = dict(checkpoint.weights(EMA))
        assert all(torch.equal(tensor, expected[name].to(dtype).to(tensor.dtype))
                   for name, tensor in again.weights("raw"))
        write_hf(again, tmp_path / f"{size} again", "raw", tokenizer=tmp_path / size)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert json.loads((tmp_path / f"{size} again" / name).read_text()) \
                == json.loads((export / name).read_text())
    assert len([*(tmp_path / "30KB").glob("*.safetensors")]) > 1
    ours, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "5GB again", export))
    assert all(torch.equal(ours[name], first[name]) for name in first)


def test_token_ids_and_suppressed_rows_survive_another_export(tmp_path, random_checkpoint):
    source = dataclasses.replace(random_checkpoint(Architecture(1, 24, 3, 40, 250)),
                                 token_ids=dict(pad_token_id=5, bos_token_id=7, eos_token_id=[9, 3]))
    write_hf(source, tmp_path / "one")
    write_hf(read_hf(tmp_path / "one"), tmp_path / "two", "raw", "bfloat16")
    one, two = (json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("one", "two"))
    assert one == two == dict(pad_token_id=5, bos_token_id=7, eos_token_id=[9, 3], suppress_tokens=[*range(250, 256)])
    config, generation = tmp_path / "one" / "config.json", tmp_path / "one" / "generation_config.json"
    for path in (config, generation):
        path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items()
                                    if name != "pad_token_id"}))
    assert read_hf(tmp_path / "one").token_ids["pad_token_id"] == 9
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(pad_token_id=256)))
    with pytest.raises(ConfigError, match="has 250 tokens, pad_token_id would be 256; give its own tokenizer"):
        write_hf(read_hf(tmp_path / "one"), tmp_path / "three", "raw")


def test_token_ids_are_those_that_transformers_generates_with(tmp_path, random_checkpoint):
    write_hf(random_checkpoint(Architecture(1, 24, 3, 40, 250)), tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(eos_token_id=[11, 9], bos_token_id=None)))
    assert read_hf(tmp_path).token_ids == dict(pad_token_id=0, bos_token_id=6, eos_token_id=[11, 9])
    path.write_text('{"eos_token_id": "end"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id: 'end' is no token id"):
        read_hf(tmp_path)


def test_an_export_keeps_the_tokens_of_the_tokenizer_beside_it(tmp_path, checkpoint, tokenizer, export):
    other = renamed(tmp_path / "other", tokenizer, "<|fim_pad|>")
    write_megatron(read_hf(export), tmp_path / "megatron")
    for source, said in ((read_hf(export), f"is another tokenizer than {export / 'tokenizer.json'}.* or remove it"),
                         (read_megatron(find_iteration(tmp_path / "megatron")), "than .* was trained with")):
        assert source.vocabulary == tokenizer.vocabulary
        with pytest.raises(ConfigError, match=said):
            write_hf(source, tmp_path / "hf", "raw", tokenizer=other)
        assert token_ids_of(source, ExportTokenizer.open(tokenizer.path))["eos_token_id"] == tokenizer.eoa


def test_a_tokenizer_beside_an_export_that_cannot_be_read_is_none_that_is_not_there(tmp_path, export, caplog):
    folder = shutil.copytree(export, tmp_path / "foreign")
    path = folder / "tokenizer.json"
    whole = path.read_bytes()
    for damaged in (whole[:5000], b"", b"\xff"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"foreign/tokenizer\.json: cannot read \(.*\); copy it again, or remove"):
            read_hf(folder)
    path.write_text('{"model": {"type": "of next year"}}')  # which somebody else's program may know
    assert not caplog.records and read_hf(folder).vocabulary is None
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{path}: a tokenizer of a kind that is not known here (") and "\n" not in line
    path.unlink()
    assert read_hf(folder).vocabulary is None and len(caplog.records) == 1


def test_an_exported_tokenizer_is_known_as_the_one_that_it_spells_as(tmp_path):
    trained = TextTokenizer(TOKENIZER)
    ExportTokenizer.open(TOKENIZER).write(tmp_path, 99)
    ours = TextTokenizer(tmp_path)
    assert ours.fingerprint == trained.fingerprint and ours.path.read_bytes() != trained.path.read_bytes()
    assert TextTokenizer(tmp_path, spelling=Spelling(eoa="<|PAD|>")).fingerprint != trained.fingerprint
    ours.path.write_text(ours.path.read_text().replace("<|fim_pad|>", "<|pad|>"))
    assert TextTokenizer(tmp_path).fingerprint != trained.fingerprint


def of_sentence_piece(folder, scheme, *, in_text=(), before=None, **flags):
    """Train a BPE that marks the beginning of words, as Llama's do; control tokens have these flags."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if before:
        made.pre_tokenizer = pre_tokenizers.Sequence([before, made.pre_tokenizer])
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.train_from_iterator(["What is 1 + 1?", "\na line\n", "a_b a\u4e2db"] * 3, trainers.BpeTrainer(
        vocab_size=420, min_frequency=1, show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False, **flags) for token in SPECIAL_TOKENS]))
    made.add_tokens([AddedToken(token, normalized=False) for token in in_text])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder)


@pytest.mark.parametrize("scheme, flags", [("first", {}), ("always", {}), ("never", {}), ("first", dict(rstrip=True)),
                                           ("always", dict(lstrip=True)), ("never", dict(single_word=True))])
def test_an_export_spells_a_prompt_and_an_answer_as_training_does(tmp_path, scheme, flags):
    text = of_sentence_piece(tmp_path / "tokenizer", scheme, **flags)
    (tmp_path / "out").mkdir()
    ExportTokenizer.open(text.path).write(tmp_path / "out", 99)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for question in ("What is 1 + 1?", "\nline", " a", "a\n"):
        prompt = text.encode_prefix("direct", question)
        assert theirs(f"<|im_start|><|object_ref_start|>{question}{EOQ}").input_ids == prompt
        assert theirs.apply_chat_template([dict(role="user", content=question)], condition="direct",
                                          return_dict=True)["input_ids"] == prompt
        assert theirs(f"<|im_start|>{EOQ}", f"{question}{EOA}").input_ids[2:] == text.encode_response(question)


@pytest.mark.parametrize("more, question", [
    (dict(in_text=["<think>more"]), "'a<think>moreb'"),
    (dict(before=pre_tokenizers.Split("_", "isolated")), ".*"),
    (dict(before=pre_tokenizers.Split(Regex("[\u4e00-\u9fff]"), "isolated")), ".*")],
    ids=["a token in texts", "underscores", "Chinese"])
def test_a_tokenizer_that_no_export_spells_alike_is_refused(tmp_path, more, question):
    text = of_sentence_piece(tmp_path / "tokenizer", "first", **more)
    with pytest.raises(ConfigError, match=rf"spells {question} behind <\|im_start\|> otherwise than alone"):
        ExportTokenizer.open(text.path)


def test_further_ends_of_an_answer_stay_beside_a_tokenizer(tmp_path, export, tokenizer):
    folder = shutil.copytree(export, tmp_path / "source")
    path = folder / "generation_config.json"
    for ends, kept in (([9, tokenizer.eoa], [tokenizer.eoa, 9]), ([9, 3], tokenizer.eoa)):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(eos_token_id=ends)))
        assert token_ids_of(read_hf(folder), ExportTokenizer.open(folder))["eos_token_id"] == kept
