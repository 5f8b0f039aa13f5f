"""Documents become examples that together are the document, cut where sentences end, whatever reads them."""
import gzip
import json
from collections import Counter
from itertools import pairwise

import pytest

from hrm_megatron.data import inputs, readers
from hrm_megatron.data.example import BadRow, RawText, RowFormat
from hrm_megatron.data.inputs import find_inputs
from hrm_megatron.data.raw_text import Sizes
from hrm_megatron.data.row_shapes import examples_of
from hrm_megatron.data.sentences import FILES, fingerprint, save_sentences, sentence_starts, train_sentences
from tests.stores import files_of

PROSE = ("Dr. Weir met Mr. Okafor at 3.5 p.m. on Friday. Did they agree? They did, e.g. on the price! Dr. Weir left. "
         "Mr. Okafor stayed; he read for an hour.\n\nIt rained. Nobody came.  Dr. Weir wrote to Mr. Okafor again.")
SENTENCES = ["Dr. Weir met Mr. Okafor at 3.5 p.m. on Friday.", " Did they agree?", " They did, e.g. on the price!",
             " Dr. Weir left.", " Mr. Okafor stayed; he read for an hour.", "\n\nIt rained.", " Nobody came.",
             "  Dr. Weir wrote to Mr. Okafor again."]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences") / "punkt"
    other = "they left within the hour and it rained again when he came to agree on the price of friday and more "
    save_sentences(train_sentences([PROSE + " " + other * 3] * 20), folder)
    return folder


@pytest.fixture
def rows(model):
    def rows(low=0.0, high=1.0, seed=0, **more):
        return RowFormat(shape="fields", raw=RawText((low, high), seed, model, fingerprint(model)), **more)
    return rows


def words(texts):
    return [len(text.split()) for text in texts]


def cut(text, rows, context=23, count=words, noted=None):
    """Examples of a document; a context of n + 2 positions has room for n words."""
    return examples_of({"text": text}, "x:1", rows, noted, Sizes(context, count))


def pieces(text, model):
    starts = sentence_starts(text, model)
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def test_a_model_that_was_trained_knows_abbreviations_and_is_kept_as_text(model, tmp_path):
    assert pieces(PROSE, model) == SENTENCES
    assert sorted(path.name for path in model.iterdir()) == sorted(FILES)
    assert {"dr", "mr"} <= set((model / "abbrev_types.txt").read_text().split("\n"))
    save_sentences(train_sentences([]), tmp_path / "untaught")
    assert len(pieces(PROSE, tmp_path / "untaught")) > len(SENTENCES)
    assert fingerprint(tmp_path / "untaught") != fingerprint(model)


@pytest.mark.parametrize("text, sentences", [
    ("今天下雨。我们走吧！「好。」他说。", ["今天下雨。", "我们走吧！", "「好。」", "他说。"]),
    ("क्या हाल है? मैं ठीक हूँ। अच्छा।", ["क्या हाल है?", " मैं ठीक हूँ।", " अच्छा।"]),
    ("كيف حالك؟ أنا بخير.", ["كيف حالك؟", " أنا بخير."]),
    ("วันนี้ฝนตก เราไปกันเถอะ", ["วันนี้ฝนตก เราไปกันเถอะ"]),
    ("First line\n \nsecond", ["First line", "\n \nsecond"]), ("   ", ["   "]), ("One", ["One"])])
def test_sentences_of_other_scripts(model, text, sentences):
    assert pieces(text, model) == sentences


def test_examples_together_are_the_document_and_fit(rows):
    for context in (3, 4, 9, 17, 30, 300):
        examples = cut(PROSE, rows(), context)
        assert "".join("".join((e.instruction + e.response).split()) for e in examples) == "".join(PROSE.split())
        assert all(len((e.instruction + e.response).split()) <= context - 2 for e in examples)
        assert all(e.response.strip() and (e.instruction + e.response) in PROSE for e in examples)
        assert all(e.condition == "" for e in examples)


def test_borders_are_those_of_sentences_and_examples_are_as_long_as_they_can_be(rows):
    context = 23
    examples = cut(PROSE, rows(), context)
    ends = {len("".join(SENTENCES[:i])) for i in range(len(SENTENCES) + 1)}
    starts, place = [], 0
    for example in examples:
        start = PROSE.index((example.instruction + example.response), place)
        starts.append(start)
        place = start + len(example.instruction + example.response)
        assert {place, start + len(example.instruction)} <= ends | set(starts)
    for one, following in pairwise(examples):
        first = next(s for s in SENTENCES if (following.instruction + following.response).startswith(s.strip()))
        assert len((one.instruction + one.response + first).split()) > context - 2


@pytest.mark.parametrize("low, high, prefix", [
    (0, 0, 0), (1, 1, 7), (0.5, 0.5, None)])
def test_the_prefix_has_the_share_that_was_asked_for(rows, low, high, prefix):
    example, = cut(PROSE, rows(low, high), 300)
    border = len("".join(SENTENCES[:prefix])) if prefix is not None else len(example.instruction)
    assert example.instruction == PROSE[:border]
    lengths = words(SENTENCES)
    shares = [sum(lengths[:i]) / sum(lengths) for i in range(len(lengths))]
    assert len(example.instruction.split()) / sum(lengths) == min(shares, key=lambda share: abs(share - low))


def test_cuts_depend_on_text_and_seed_alone(rows):
    other = PROSE.replace("Friday", "Monday")
    assert cut(PROSE, rows(seed=1)) == cut(f"\n{PROSE} ", rows(seed=1))
    shares = {seed: [len(e.instruction) for text in (PROSE, other) for e in cut(text, rows(seed=seed))]
              for seed in range(4)}
    assert len({tuple(share) for share in shares.values()}) > 1
    assert any(share[:len(share) // 2] != share[len(share) // 2:] for share in shares.values())


def test_sentences_longer_than_the_context_are_cut_at_words_and_counted(rows):
    noted = Counter()
    text = " ".join(f"w{i}" for i in range(50)) + ". Short one. "
    examples = cut(text, rows(), 12, noted=noted)
    assert " ".join(" ".join((e.instruction + e.response).split()) for e in examples) == text.strip()
    assert noted == {"sentences longer than the context, cut inside": 1,
                     "examples of one sentence, without a prefix": len(examples) - 1}


def test_scripts_without_spaces_are_cut_between_characters(rows):
    noted = Counter()
    text = "ฝนตก" * 40
    examples = cut(text, rows(0, 0), 18, count=lambda texts: list(map(len, texts)), noted=noted)
    assert "".join(e.instruction + e.response for e in examples) == text
    assert all(len(e.response) <= 16 for e in examples) and noted["sentences longer than the context, cut inside"] == 1


def test_sentences_that_grow_when_they_are_joined_still_fit(rows):
    def count(texts):  # a tokenizer for which white space inside costs more
        return [len(text.split()) + 3 * text.strip().count(" ") for text in texts]
    for context in (20, 40, 80):
        examples = cut(PROSE, rows(), context, count)
        assert all(sum(count([e.instruction, e.response])) <= context - 2 for e in examples)


def test_white_space_without_end_neither_hangs_nor_gives_empty_responses(rows):
    text = "One. " + " " * 5_000 + "two. Three" + "\n" * 500 + "end"
    examples = cut(text, rows(), 10, count=lambda texts: list(map(len, texts)))
    assert all(e.response.strip() for e in examples)
    assert "".join("".join((e.instruction + e.response).split()) for e in examples) == "One.two.Threeend"


def test_empty_documents_are_counted_and_broken_ones_bad(rows):
    noted = Counter()
    assert cut(" \n", rows(), noted=noted) == [] and noted == {"empty documents, passed over": 1}
    for row, message in (({"texts": "a"}, "no field 'text'"), ({"text": 3}, "text=3 is not a string"),
                         ({"text": "a", "condition": "loud"}, "unknown tag 'loud'"),
                         ({"text": "a" * 9}, "9 characters")):
        with pytest.raises(BadRow, match=f"x:1: .*{message}"):
            examples_of(row, "x:1", rows(max_characters=8), None)
    with pytest.raises(BadRow, match="x:1: 2 positions have no room for text"):
        cut("a", rows(), 2)


def test_conditions_are_those_of_the_row_or_the_default(rows):
    row = {"text": PROSE, "condition": "cot,synth"}
    assert {e.condition for e in examples_of(row, "x", rows(), None)} == {"cot,synth"}
    for condition, tags in (("", 0), (" ", 0), ("cot", 1), ("cot, synth", 2)):
        examples = examples_of({**row, "condition": condition}, "x", rows(), None, Sizes(23 + tags, words))
        assert [e.response for e in examples] == [e.response for e in cut(PROSE, rows())]
    assert {(e.condition, e.defaulted) for e in cut(PROSE, rows(default_condition="noisy"))} == {("noisy", True)}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("\ufeff" + PROSE)
    (folder / "b.md.gz").write_bytes(gzip.compress(PROSE[50:].encode()))
    texts = (PROSE * 4, "", "今天下雨。" * 40)
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def flags(corpus, tmp_path, tokenizer, *more):
    return ["--input", str(corpus), "--output-prefix", str(tmp_path / "x"), "--tokenizer-model", str(tokenizer.path),
            "--split-sentences", "--sentence-model", str(tmp_path / "punkt"), "--context-size", "60", *more]


def shards_of(prefix):
    return {name for name in files_of(prefix) if name.endswith(".bin")}  # named by contents


def test_the_tool_trains_a_model_once_and_cuts_a_folder(corpus, tmp_path, tokenizer, tool, capsys):
    assert tool("preprocess_data")(flags(corpus, tmp_path, tokenizer)) == 0
    said = capsys.readouterr().out
    assert "1 empty documents, passed over" in said and " 0 responses truncated" in said
    made = shards_of(tmp_path / "x")
    trained = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "punkt").iterdir()}
    for more in (["--workers", "2"], ["--cut-seed", "1"], ["--prefix-fraction", "0", "0"]):
        assert tool("preprocess_data")(flags(corpus, tmp_path, tokenizer, "--overwrite", *more)) == 0
        assert (shards_of(tmp_path / "x") == made) == (more[0] == "--workers")
        capsys.readouterr()
        assert tool("preprocess_data")(flags(corpus, tmp_path, tokenizer)) == (more[0] != "--workers")
    assert trained == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "punkt").iterdir()}
    assert tool("train_tokenizer")(["--input", str(corpus), "--output", str(tmp_path / "tok"), "--vocab-size", "300",
                                    "--split-sentences", "--sentence-model", str(tmp_path / "punkt")]) == 0


def test_raw_text_without_prefixes_passes_lint(corpus, tmp_path, tokenizer, tool):
    assert tool("preprocess_data")(flags(corpus, tmp_path, tokenizer, "--prefix-fraction", "0", "0", "--lint",
                                         "error")) == 0


def test_what_the_tool_writes_below_its_input_is_no_book(corpus, tokenizer, tool, capsys, caplog, monkeypatch):
    monkeypatch.setattr(inputs, "SHOWN_NAMES", 99)
    given = flags(corpus, corpus / "made", tokenizer)
    (corpus / ".made.partial-0123456789abcdef0123456789abcdef").mkdir()
    (corpus / ".made.partial-0123456789abcdef0123456789abcdef" / FILES[1]).write_text("it")
    (corpus / "notes.report.md").write_text("A report of one's own.")
    assert [tool("preprocess_data")(given) for _ in range(2)] == [0, 0]
    assert "sources: 4 kept" in capsys.readouterr().out and "not read: " in caplog.text
    assert f"{corpus}/made/x.report.md" in caplog.text and f"{corpus}/made/punkt/{FILES[1]}" in caplog.text
    assert find_inputs([f"{corpus}/**/*.report.md"], documents=True) == [corpus / "notes.report.md"]


def test_a_model_that_another_task_has_saved_by_now_is_taken(model, tmp_path):
    files = {path.name: path.read_text() for path in model.iterdir()}
    save_sentences(files, tmp_path / "punkt")
    before = (tmp_path / "punkt").stat().st_ino
    save_sentences(files, tmp_path / "punkt")
    assert (tmp_path / "punkt").stat().st_ino == before and [path.name for path in tmp_path.iterdir()] == ["punkt"]


@pytest.mark.parametrize("change, message", [
    (["--prefix-fraction", "0.5", "0.1"], "--prefix-fraction 0.5 0.1: two numbers of 0 to 1"),
    (["--row-shape", "alpaca"], "--row-shape rows; leave one out"),
    (["--json-keys", "condition", "q", "a"], "--json-keys rows; leave one out"),
    (["--sentence-model", "{corpus}"], "no Punkt model in nltk's punkt_tab format"),
    (["--text-key", "body"], "c.jsonl:1: no field 'body' (there are ['text']); add it or name yours with --text-key")])
def test_flags_of_documents_are_refused_in_one_line(corpus, tmp_path, tokenizer, tool, capsys, change, message):
    given = flags(corpus, tmp_path, tokenizer, *(part.format(corpus=corpus) for part in change))
    assert tool("preprocess_data")(given) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error


def test_flags_of_documents_without_documents_and_documents_without_flags_are_refused(
        corpus, tmp_path, tokenizer, tool, capsys):
    given = flags(corpus / "c.jsonl", tmp_path, tokenizer)
    given.remove("--split-sentences")
    assert tool("preprocess_data")(given) == 1
    assert "--sentence-model has no effect without --split-sentences" in capsys.readouterr().err
    given = [flag for flag in given if flag not in ("--sentence-model", str(tmp_path / "punkt"))]
    assert tool("preprocess_data")(given) == 1
    assert "c.jsonl:1: a document (its fields: ['text']); --split-sentences makes" in capsys.readouterr().err
    given[:] = flags(corpus, tmp_path, tokenizer)
    del given[given.index("--sentence-model"):][:2]
    given = [flag for flag in given if flag not in ("--sentence-model", str(tmp_path / "punkt"))]
    assert tool("preprocess_data")(given) == 1
    assert "--split-sentences needs --sentence-model DIR" in capsys.readouterr().err


def test_a_text_file_that_is_not_utf8_is_a_bad_row(tmp_path, rows):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("word " * 20_000)
    for name, kind in (("a.txt", "not UTF-8"), ("b.txt", "row too long")):
        piece, = readers.pieces(tmp_path / name, 1000, rows(max_characters=10))
        (place, bad), = readers.read_piece(piece, rows(max_characters=10))
        assert (place, bad.kind) == (str(tmp_path / name), kind) and str(bad).startswith(place)
