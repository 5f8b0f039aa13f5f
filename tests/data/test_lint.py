import json
import random
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from hrm_megatron.config import ConfigError
from hrm_megatron.data.characters import Texts
from hrm_megatron.data.example import Example, RowFormat
from hrm_megatron.data.example_batch import ExampleBatch
from hrm_megatron.data.lint import BROKEN_LATEX, CONSTANT_FROM, Lint, broken_latex
from hrm_megatron.data.preprocess import encode_chunk, preprocess
from hrm_megatron.data.readers import pieces
from hrm_megatron.data.spelling import SPECIAL_TOKENS, Spelling
from hrm_megatron.data.tokenizer import TextTokenizer
from tests.stores import part_of

CLEAN = [
    "plain text\nequal lines\n\nabandon\tindent\ttext\r\nright after\r\nfloor, \tan 1 \ttop \n\tar",
    r"\boxed{\frac{1}{2} \times \theta} \neq \nabla \rho \right)",
    "caf\u00e9 \u0928\u092e\u0938\u094d\u0924\u0947 \u4f60\u597d \U0001f600", "x < 3 and <b>bold</b>, <|nothing|>",
    "page one.\x0cPage two", "a\x08 overstrike",
]
LATEX = (r"\boxed{3}", r"\begin{matrix}", r"\frac{1}{2}", r"\forall x", r"3 \times 4", r"\text{so}", r"\theta",
         r"\nabla f", r"a \neq b", r"\notin A", r"\rangle", r"\left( x \right)", r"\rho_1")


def rows_of(texts, response="an answer"):
    return [(f"f:{i}", Example("direct", text, f"{response} {i}")) for i, text in enumerate(texts, start=1)]


def found(placed, special=None):
    lint = Lint()
    lint.look("f", ExampleBatch.of(placed), special)
    return lint


def as_json_reads_it(text):
    """The text of a row whose writer forgot to double the backslashes."""
    return json.loads(f'"{text}"', strict=False) if "\\l" not in text else json.loads(f'"{text[6:]}"', strict=False)


@pytest.mark.parametrize("text", LATEX)
def test_what_json_makes_of_latex_is_found(text):
    broken = as_json_reads_it(text)
    assert broken_latex(Texts.of(["\u4f60", f"{broken} and more"]))
    lint = found(rows_of(["fine", broken, broken]))
    assert lint.counts["latex"] == 2 and lint.first["latex"] == "f:2 (instruction)"
    assert not broken_latex(Texts.of([text]))


def test_clean_texts_have_nothing_to_warn_of(tokenizer):
    assert found(rows_of(CLEAN), tokenizer.hidden_strings).lines() == []
    assert (tokenizer.loss(), tokenizer.unknown) == (None, None)
    assert len(set(BROKEN_LATEX)) == len(BROKEN_LATEX)


@pytest.mark.parametrize("row, kind, place", [
    (Example("", "lost \ufffd", "b"), "replacement", "f:3 (instruction)"),
    (Example("", "same", " same\n"), "echo", "f:3"),
    (Example("", "a", "\u200b\ufeff \x01"), "blank", "f:3 (response)"),
    (Example("", "a", "e\u0301"), "decomposed", "f:3 (response)"),
    (Example("", "a <think>", "b"), "special", "f:3 (instruction)"),
])
def test_each_kind_is_counted_with_its_first_place(tokenizer, row, kind, place):
    placed = [*rows_of(CLEAN[:2]), ("f:3", row), ("f:4", Example("", "\u00e9", "c")), ("f:5", row)]
    lint = found(placed, tokenizer.hidden_strings)
    assert (lint.counts[kind], lint.first[kind]) == (2, place)
    (line,) = lint.lines()
    assert line.startswith("lint: 2 ") and line.endswith(f"First {place}")
    with pytest.raises(ConfigError, match="--lint warn"):
        lint.refuse()


def test_the_empty_prefix_of_a_document_is_no_blank_text():
    assert not found([("f:1", Example("", "", "It rained."))]).lines()
    assert found([("f:1", Example("", "\u200b", "It rained."))]).counts["blank"] == 1


def test_one_normal_form_alone_is_no_mixture():
    assert found(rows_of(["e\u0301 only", "ascii"])).lines() == []
    assert found(rows_of(["\u00e9 only", "ascii"])).lines() == []


def test_every_special_string_is_found_unless_it_becomes_a_token(tokenizer):
    for token in SPECIAL_TOKENS:
        assert found(rows_of([f"a{token}b"]), tokenizer.hidden_strings).counts["special"] == 1
    asked = TextTokenizer(tokenizer.path, spelling=Spelling(in_text=("<think>",)))
    assert found(rows_of(["<think>"]), asked.hidden_strings).counts["special"] == 0
    assert found(rows_of(["</think>"]), asked.hidden_strings).counts["special"] == 1


def test_a_source_with_one_response_is_named():
    same = [(place, replace(example, response="No.")) for place, example in rows_of(map(str, range(CONSTANT_FROM)))]
    assert "all 8 responses of f are the same" in found(same).lines()[0]
    assert found(same[1:]).lines() == [], "a few rows may agree by chance"
    assert found([*same, ("f:9", Example("", "a", "Yes."))]).lines() == []


def test_parts_give_what_the_whole_gives(tokenizer):
    rng = random.Random(1)
    texts = [*CLEAN, "\ufffd", "e\u0301", "<think>", *map(as_json_reads_it, LATEX)]
    placed = rows_of([rng.choice(texts) for _ in range(200)])
    parts = Lint()
    for start in range(0, 200, 7):
        part = found(placed[start:start + 7], tokenizer.hidden_strings)
        parts.merge(Lint.from_json(json.loads(json.dumps(part.to_json()))))
    whole = found(placed, tokenizer.hidden_strings)
    assert (parts.lines(), parts.first) == (whole.lines(), whole.first)


def test_characters_without_a_token_are_found_with_their_texts(tmp_path, write_jsonl, caplog):
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<unk>", "a", "b"])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path)
    texts = [("a", "b"), ("a " * 30, "c"), ("b c", "a"), ("a", "c d " * 9), ("a", "b " * 9 + "c")]
    path = write_jsonl("rows.jsonl", [dict(condition="cot", instruction=q, response=a) for q, a in texts])
    (piece,) = pieces(path)
    encoded = encode_chunk(tokenizer, piece, RowFormat(), 12)
    assert len(encoded.bad_rows) == 1  # the second row has no room for its response, the last none for its end
    assert (encoded.lint.counts["unknown"], encoded.lint.first["unknown"]) == (2, f"{path}:3 (instruction)")
    with pytest.raises(ConfigError, match="lint: 2 texts with characters that the tokenizer has no token for"):
        preprocess([path], tmp_path / "x", tokenizer, context_size=12, lint="error", skip_bad_rows=True)
    (said,) = caplog.messages
    assert said.startswith(f"{tokenizer.path}: ") and "caf\u00e9" in said.lower() and "comes back as '<unk> " in said


@pytest.mark.parametrize("workers", [1, 2])
def test_the_report_warns_and_error_writes_nothing(tokenizer, write_jsonl, tmp_path, workers):
    rows = [dict(condition="cot", instruction=f"question {i}", response=f"answer {i}") for i in range(40)]
    rows[30]["response"] = "\x0crac{1}{2}"
    rows[35]["response"] = "a long answer " * 40
    path = write_jsonl("rows.jsonl", rows)

    def run(name, lint):
        return preprocess([path], tmp_path / name, tokenizer, workers, context_size=300, chunk_bytes=200, lint=lint)

    lines = run("warned", "warn").lines()
    assert any(line.startswith("lint: 1 texts with control") and f"{path}:31 (response)" in line for line in lines)
    assert any(line.startswith("lint: 1 responses cut") and line.endswith(f"First {path}:36") for line in lines)
    assert not any("lint" in line for line in run("silent", "off").lines())
    with pytest.raises(ConfigError, match="lint: 1 texts with control.*rows.jsonl:31"):
        run("refused", "error")
    assert not list(tmp_path.glob("refused*"))
    assert part_of(tmp_path / "warned", "bin").read_bytes() == part_of(tmp_path / "silent", "bin").read_bytes()


def test_a_constant_piece_is_no_constant_source(tokenizer, write_jsonl, tmp_path):
    rows = [dict(condition="cot", instruction=f"q{i}", response="no" if i < 50 else "yes") for i in range(60)]
    path = write_jsonl("rows.jsonl", rows)
    assert len(list(pieces(path, 500))) > 3
    assert preprocess([path], tmp_path / "x", tokenizer, chunk_bytes=500, lint="error") is not None
    same = write_jsonl("same.jsonl", rows[:50])
    with pytest.raises(ConfigError, match="all 50 responses"):
        preprocess([same], tmp_path / "y", tokenizer, chunk_bytes=500, lint="error")


def test_lint_is_left_out_where_it_is_off(tokenizer, write_jsonl):
    path = write_jsonl("rows.jsonl", [dict(condition="", instruction="\ufffd", response="b")])
    (piece,) = pieces(path)
    assert encode_chunk(tokenizer, piece, RowFormat(), 100, lint=False).lint == Lint()
    assert encode_chunk(tokenizer, piece, RowFormat(), 100).lint.counts["replacement"] == 1
