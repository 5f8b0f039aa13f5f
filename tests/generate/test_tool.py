"""tools/generate.py as a user calls it: answers on stdout, one line on stderr for everything that is wrong."""
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from hrm_megatron.config import ConfigError
from hrm_megatron.convert import ledger
from tests.random_checkpoint import TOKENIZER, write_random_checkpoint
from tests.tools import load_tool

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "generate.py"
QUESTIONS = ["What is 7 plus 5?", "Name the tens digit of 7543."]


@pytest.fixture(scope="module")
def checkpoints(single_rank, tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("tool") / "checkpoints", seq_length=48)


@pytest.fixture
def expected(checkpoints):
    """What generate() says, as text."""
    from hrm_megatron.data.tokenizer import TextTokenizer
    from hrm_megatron.generate.decode import generate
    from hrm_megatron.generate.load import load_model, open_checkpoint

    def answer(questions, condition="direct", weights="ema", max_new_tokens=12, sampling=None):
        tokenizer = TextTokenizer(TOKENIZER)
        answers = generate(load_model(open_checkpoint(checkpoints), weights),
                           [tokenizer.encode_prefix(condition, question) for question in questions], tokenizer.eoa,
                           tokenizer.vocab_size, max_new_tokens, sampling)
        return "".join(tokenizer.decode([i for i in ids if i != tokenizer.eoa]) + "\n" for ids in answers)
    return answer


@pytest.fixture
def tool(single_rank, checkpoints, monkeypatch, capsys):
    """Call the tool's main with flags added to a good command line; return (status, stdout, stderr)."""
    module = load_tool("generate")

    def call(*flags, load=checkpoints, tokenizer=TOKENIZER, prompt=("--prompt", QUESTIONS[0])):
        named = [] if tokenizer is None else ["--tokenizer-model", str(tokenizer)]
        monkeypatch.setattr(sys, "argv", ["generate.py", "--load", str(load), *named, *map(str, prompt),
                                          "--max-new-tokens", "12", *map(str, flags)])
        status = module.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return call


def test_fp32_is_not_tf32(tool):
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    try:
        assert tool()[0] == 0 and torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_command_prints_the_answer_alone(checkpoints, expected):
    done = subprocess.run([sys.executable, TOOL, "--load", checkpoints, "--tokenizer-model", TOKENIZER, "--prompt",
                           QUESTIONS[1], "--max-new-tokens", "12"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, expected(QUESTIONS[1:])), done.stderr
    assert len(done.stdout) > 1
    assert "156 of 256 bytes have no token" in done.stderr  # a warning, and no answer


def test_flags_reach_the_answer(tool, expected):
    from hrm_megatron.generate.sampling import Sampling

    greedy = expected(QUESTIONS[:1])
    assert tool()[:2] == (0, greedy)
    for flags, want in ((["--weights", "raw"], expected(QUESTIONS[:1], weights="raw")),
                        (["--condition", "synth,cot"], expected(QUESTIONS[:1], "synth,cot")),
                        (["--condition", ""], expected(QUESTIONS[:1], "")),
                        (["--max-new-tokens", "5"], expected(QUESTIONS[:1], max_new_tokens=5)),
                        (["--temperature", "2", "--top-p", "0.9", "--seed", "8"],
                         expected(QUESTIONS[:1], sampling=Sampling(2.0, 0.9, 8)))):
        assert want != greedy, flags
        assert tool(*flags)[:2] == (0, want), flags


def test_a_file_has_one_prompt_per_line(tool, expected, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(QUESTIONS) + "\n")
    status, out, _ = tool(prompt=("--prompt-file", prompts))
    assert (status, out) == (0, expected(QUESTIONS))


def test_a_bar_is_for_terminals_and_stands_below_the_answers(tool, expected, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(QUESTIONS))
    prompts, shown = ("--prompt-file", tmp_path / "prompts.txt"), tqdm.__init__
    always = dict(delay=0, mininterval=0)
    monkeypatch.setattr(tqdm, "__init__", lambda bar, *args, **options: shown(bar, *args, **options | always))
    monkeypatch.setattr(ledger, "LINE_SECONDS", 0.0)
    err = tool(prompt=prompts)[2]
    assert "answer/s" not in err and f"{len(QUESTIONS)} of {len(QUESTIONS)} answers\n" in err
    screen = type("Screen", (io.StringIO,), dict(isatty=lambda self: True))()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    assert tool(prompt=prompts)[0] == 0
    assert "answer/s" in screen.getvalue()
    lines = [line.rpartition("\r")[2] for line in screen.getvalue().split("\n")]
    assert [line for line in lines if line in expected(QUESTIONS).splitlines()] == expected(QUESTIONS).splitlines()


def test_a_prompt_ends_at_line_feeds_only(tool, expected, tmp_path):
    questions = ["What is\u20287?", "Name\x0bthe\x0cten\x85s.", "And?"]
    (tmp_path / "prompts.txt").write_bytes(("\ufeff" + "\r\n".join(questions) + "\n").encode())
    status, out, _ = tool(prompt=("--prompt-file", tmp_path / "prompts.txt"))
    assert (status, out) == (0, expected(questions))


def test_answers_that_hold_line_ends_stay_one_record(tool, tmp_path, monkeypatch):
    from hrm_megatron.data.tokenizer import TextTokenizer

    answer = "two\nlines\u2028and é"
    monkeypatch.setattr(TextTokenizer, "decode", lambda self, ids: answer * (len([*ids]) > 0))
    one_token = ("--max-new-tokens", "1")
    (tmp_path / "prompts.txt").write_text("\n".join(QUESTIONS))
    flags = dict(prompt=("--prompt-file", tmp_path / "prompts.txt"))
    status, out, err = tool("--jsonl", "--condition", "cot", *one_token, **flags)
    assert (status, err.count("--jsonl")) == (0, 0)
    assert [json.loads(line) for line in out.splitlines()] == [
        dict(condition="cot", instruction=question, response=answer, finish="length") for question in QUESTIONS]
    status, out, err = tool(*one_token, **flags)
    assert (status, out) == (0, f"{answer}\n" * 2)
    assert err.endswith("2 of 2 answers hold line ends; --jsonl keeps each on one line\n")


@pytest.mark.parametrize(("flags", "options", "message"), [
    ([], dict(prompt=("--prompt-file", "/dev/null")), "--prompt-file /dev/null: empty; write one instruction per line"),
    ([], dict(prompt=("--prompt", "na\udcefve")), "--prompt 'na\\udcefve': not UTF-8 at character 3"),
    ([], dict(tokenizer="nowhere"), "nowhere: no tokenizer there (No such file or directory); train one with"),
    ([], dict(load="nowhere"), "--load nowhere: no folder there"),
    (["--ckpt-step", "3"], {}, "iter_0000003: not there; choose another with --ckpt-step (complete: iter_0000007)"),
    (["--condition", "direct,loud"], {}, "--prompt: unknown tag 'loud'"),
    ([], dict(prompt=("--prompt", " ")), "--prompt: empty instruction; write one"),
    ([], dict(prompt=("--prompt", "long " * 20)), "--prompt: 103 tokens, which leave no room for an answer in the "
     "model's context of 48; shorten it"),
    (["--jsonl"], dict(prompt=("--prompt", "x"), tokenizer=None), "no tokenizer.json in it; give the tokenizer of the"),
    (["--stream", "--jsonl"], {}, "--stream is incompatible with --jsonl: leave one of them out"),
    (["--overwrite"], {}, "--overwrite: replaces an --output; give one, or leave it out"),
    (["--logprobs", "2"], {}, "--logprobs: are written as JSON; give --jsonl or --output too"),
    (["--samples", "2", "--stream"], {}, "--samples 2: only one answer is printed while it grows"),
    (["--batch-size", "0"], {}, "--batch-size 0: must be at least 1"),
    (["--samples", "2"], {}, "--samples 2: greedy answers are all the same"),
    (["--l-cycles", "0"], {}, "l_cycles=0: must be at least 1"),
    (["--stop", ""], {}, "a stop string must not be empty"),
    (["--top-k", "5"], {}, "without effect at temperature=0"),
    (["--temperature", "-1"], {}, "temperature=-1.0: must be 0 (greedy) or positive"),
    (["--temperature", "1", "--top-p", "0"], {}, "top_p=0.0: must be above 0"),
    ([], dict(prompt=("--prompt-file", "nowhere.txt")),
     "--prompt-file nowhere.txt: cannot be read (No such file or directory); name a text file"),
    ([], dict(prompt=("--input", ".")), "--input .: cannot be read (Is a directory); name a text file"),
])
def test_bad_input_is_one_line(tool, tmp_path, monkeypatch, flags, options, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = tool(*flags, **options)
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_tokenizer_of_another_size_is_refused(tool, converted):
    status, out, err = tool(load=converted)
    assert (status, out) == (1, "")
    assert "tokenizer.json: 286 entries, the checkpoint has 256; give the tokenizer of its training data" in err


def test_prompts_that_are_no_text_are_one_line(tool, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("naïve\n".encode("latin-1"))
    status, out, err = tool(prompt=("--prompt-file", tmp_path / "prompts.txt"))
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("error: ") and "prompts.txt: not UTF-8 (invalid continuation byte at byte 2)" in err


def rows_file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return ("--input", path)


def test_jsonl_comes_in_and_goes_out_in_order(tool, expected, tmp_path):
    rows = [dict(id=3, instruction=QUESTIONS[0], response="12"), dict(instruction=QUESTIONS[1], condition="cot")] * 3
    answers = tmp_path / "out" / "answers.jsonl"
    flags = ("--output", answers, "--batch-size", "2", "--logprobs", "1", "--max-new-tokens", "5")
    status, out, err = tool(*flags, prompt=rows_file(tmp_path, *rows))
    assert (status, out) == (0, ""), err
    assert "key-value cache: " in err and err.endswith("6 questions answered\n")
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    logprobs = [row.pop("logprobs") for row in found]
    texts = [expected(QUESTIONS[:1], max_new_tokens=5)[:-1], expected(QUESTIONS[1:], "cot", max_new_tokens=5)[:-1]]
    first = dict(id=3, reference="12", condition="direct", instruction=QUESTIONS[0], response=texts[0])
    second = dict(condition="cot", instruction=QUESTIONS[1], response=texts[1])
    assert [dict(row, finish=None) for row in found] == [dict(first, finish=None), dict(second, finish=None)] * 3
    for each in [each for greedy in logprobs for each in greedy]:
        assert each["top"] == [dict(token=each["token"], id=each["id"], logprob=each["logprob"])]


@pytest.mark.parametrize("flag", ["--input", "--prompt-file"])
def test_the_questions_are_not_written_over(tmp_path, flag):
    module, path = load_tool("generate"), rows_file(tmp_path, dict(instruction="x"))[1]
    args = module.parser().parse_args(["--load", "x", flag, str(path), "--output", str(path), "--overwrite"])
    with pytest.raises(ConfigError, match=f"^--output .*rows.jsonl: is what {flag} reads, and would be lost"):
        module.check_flags(args)


def test_an_interrupted_run_goes_on_and_answers_nothing_twice(tool, tmp_path, monkeypatch):
    from hrm_megatron.generate.answer_file import AnswerFile
    from hrm_megatron.program import Stopped

    rows = [dict(instruction=f"{i} plus {i}?") for i in range(6)]
    prompt = rows_file(tmp_path, *rows)
    flags = ("--batch-size", "2", "--temperature", "2", "--seed", "9", "--samples", "2")
    assert tool(*flags, "--output", tmp_path / "whole", prompt=prompt)[0] == 0
    written, stock = [], AnswerFile.write

    def write(self, record):
        if len(written) == 3:
            raise Stopped(130)
        written.append(record["instruction"])
        stock(self, record)
    monkeypatch.setattr(AnswerFile, "write", write)
    with pytest.raises(Stopped):
        tool(*flags, "--output", tmp_path / "answers", prompt=prompt)
    status, _, err = tool(*flags, "--output", tmp_path / "answers", prompt=rows_file(tmp_path, *rows, rows[0]))
    assert status == 1 and "answers.partial: was begun with other questions (6 of them, not 7); give the former" in err
    prompt = rows_file(tmp_path, *rows)
    monkeypatch.setattr(AnswerFile, "write", lambda self, record: written.append(record["instruction"])
                        or stock(self, record))
    status, _, err = tool(*flags, "--output", tmp_path / "answers", prompt=prompt)
    assert status == 0 and "goes on after 3 of 6 answers" in err
    assert written == [f"{i} plus {i}?" for i in range(6)]
    assert (tmp_path / "answers").read_bytes() == (tmp_path / "whole").read_bytes()
    status, _, err = tool(*flags, "--output", tmp_path / "answers", prompt=prompt)
    assert status == 1 and err.endswith("exists; choose another, or pass --overwrite\n")


@pytest.mark.parametrize(("row", "message"), [
    ("{\n", "rows.jsonl:2: broken JSON ("),
    ("[1]\n", "rows.jsonl:2: [1] is not a JSON object"),
    (dict(question="x"), "rows.jsonl:2: instruction=None is not a string; write one"),
    (dict(instruction=""), "rows.jsonl:2: empty instruction"),
    (dict(instruction="x", condition="loud"), "rows.jsonl:2: unknown tag 'loud'"),
    (dict(instruction="x", condition=None), "rows.jsonl:2: condition=None is not a string"),
    (dict(instruction="x", response="1", reference="2"), "rows.jsonl:2: has both 'response' and 'reference'"),
    (dict(instruction="x", logprobs=[1]), "rows.jsonl:2: has 'logprobs', which would stand beside another answer"),
    (dict(instruction="x", finish="1815"), "rows.jsonl:2: has 'finish' without a response, and the answer's would"),
    (dict(instruction="much " * 30), "rows.jsonl:2: 153 tokens, which leave no room"),
])
def test_a_bad_row_is_named_before_anything_is_answered(tool, tmp_path, row, message):
    status, out, err = tool("--output", tmp_path / "answers", prompt=rows_file(tmp_path, dict(instruction="x"), row))
    assert (status, out) == (1, "") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "answers").exists()


def test_several_samples_are_a_list(tool, tmp_path):
    flags = ("--samples", "3", "--temperature", "3")
    status, out, _ = tool(*flags, "--jsonl")
    found = json.loads(out)
    assert status == 0 and len(set(found["responses"])) == 3 == len(found["finish"])
    assert tool(*flags)[1] == "".join(f"{text}\n" for text in found["responses"])


def test_an_answer_streams(tool, expected):
    assert tool("--stream")[:2] == (0, expected(QUESTIONS[:1]))


def test_lines_are_answered_as_they_come(tool, expected, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTIONS[0]}\n\n{'long ' * 20}\n{QUESTIONS[1]}\n"))
    status, out, err = tool(prompt=("--interactive",))
    assert (status, out) == (0, expected(QUESTIONS))
    assert "error: line 3: 103 tokens, which leave no room" in err and err.count("key-value cache") == 1


def test_a_line_has_the_random_numbers_of_its_place(tool, monkeypatch, tmp_path):
    lines = f"{QUESTIONS[0]}\n" * 3
    (tmp_path / "lines").write_text(lines)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    said = tool("--temperature", "3", prompt=("--interactive",))[1]
    assert said == tool("--temperature", "3", prompt=("--prompt-file", tmp_path / "lines"))[1]
    assert len({*said.split("\n")}) > 2


def test_input_that_is_no_text_is_one_line(tool, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"na\xefve\n"), encoding="utf-8"))
    status, out, err = tool(prompt=("--interactive",))
    assert (status, out) == (1, "") and err.count("\n") == 1 and "standard input: not UTF-8 (" in err


def test_stop_strings_and_cycles_reach_the_answer(tool, expected):
    whole = expected(QUESTIONS[:1])[:-1]
    assert len(whole) > 6
    assert tool("--stop", whole[3:5], "--stop", "never")[1] == whole[:whole.index(whole[3:5])] + "\n"
    assert len({tool(*flags)[1] for flags in ((), ("--h-cycles", "1"), ("--l-cycles", "1"))}) == 3
    assert tool("--h-cycles", "2", "--l-cycles", "3")[1] == whole + "\n"
    ended = json.loads(tool("--exit-threshold", "1e9", "--jsonl")[1])
    assert (ended["h_cycles"], ended["response"] + "\n") == (1, tool("--h-cycles", "1")[1])
    status, out, err = tool("--exit-threshold", "0.1", "--h-cycles", "1")
    assert (status, out) == (1, "") and "error: exit threshold 0.1: has no effect" in err


def test_more_than_one_rank_is_refused(tool, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out, err = tool()
    assert (status, out) == (1, "") and "WORLD_SIZE=2: generation runs in one process" in err


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """The checkpoint as a transformers folder with its tokenizer, EMA weights in fp32."""
    from hrm_megatron.convert.hf import write_hf
    from hrm_megatron.generate.load import open_checkpoint

    folder = tmp_path_factory.mktemp("exported") / "hf"
    write_hf(open_checkpoint(checkpoints), folder, tokenizer=TOKENIZER)
    return folder


def test_an_export_answers_with_the_tokenizer_beside_it(tool, expected, exported):
    assert tool(load=exported, tokenizer=None)[:2] == (0, expected(QUESTIONS[:1]))
    assert tool(load=exported)[:2] == (0, expected(QUESTIONS[:1]))
    for flags, message in ((["--ckpt-step", "3"], "has no steps"), (["--no-verify-checkpoint"], "has no checksums"),
                           (["--weights", "ema"], "one kind and does not say of which; leave the flag out")):
        status, out, err = tool(*flags, load=exported)
        assert (status, out) == (1, "") and message in err


@pytest.mark.parametrize("manifest, said", [
    ('{"tensors": {"lm_head.weight": {"sha256": "of others"}}}', "lm_head.weight is not what was exported"),
    ("{", "conversion.json: cannot read")])
def test_the_checksums_of_an_export_can_be_passed_over(tool, expected, exported, manifest, said):
    (exported / "conversion.json").write_text(manifest)
    try:
        assert said in tool(load=exported)[2]
        status, out, err = tool("--no-verify-checkpoint", load=exported)
    finally:
        (exported / "conversion.json").unlink()
    assert (status, out) == (0, expected(QUESTIONS[:1])) and "was not verified" in err


def test_another_tokenizer_of_the_same_size_is_refused_beside_an_export(tool, exported, tmp_path):
    text = (TOKENIZER / "tokenizer.json").read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
    swapped = json.loads(text)
    swapped["model"]["vocab"] |= {one: vocabulary[other], other: vocabulary[one]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(swapped))
    status, out, err = tool(load=exported, tokenizer=tmp_path)
    assert (status, out) == (1, "") and "is another tokenizer than" in err


def test_another_tokenizer_than_the_checkpoint_was_trained_with_is_refused(checkpoints, tmp_path):
    from hrm_megatron.convert.to_megatron import write_megatron
    from hrm_megatron.data.tokenizer import TextTokenizer
    from hrm_megatron.generate.load import check_tokenizer, open_checkpoint

    checkpoint, tokenizer = open_checkpoint(checkpoints), TextTokenizer(TOKENIZER)
    check_tokenizer(tokenizer, replace(checkpoint, vocabulary=tokenizer.vocabulary))
    with pytest.raises(ConfigError, match="has other tokens than the tokenizer that .* was trained with"):
        check_tokenizer(tokenizer, replace(checkpoint, vocabulary="another"))
    write_megatron(replace(checkpoint, vocabulary="another"), tmp_path / "written")
    assert open_checkpoint(tmp_path / "written").vocabulary == "another"


def test_a_folder_of_two_formats_is_refused(tool, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "both")
    (tmp_path / "both" / "latest_checkpointed_iteration.txt").write_text("2")
    status, out, err = tool(load=tmp_path / "both")
    assert (status, out) == (1, "") and "holds models of transformers and Megatron; give an iteration in it" in err


def test_a_folder_of_gguf_is_refused_as_what_it_is(tool, tmp_path):
    (tmp_path / "model.gguf").touch()
    assert tool(load=tmp_path) == (1, "", f"error: --load {tmp_path}: GGUF, which llama.cpp reads; give the checkpoint "
                                          "that it was made of\n")


def test_a_folder_of_hrm_text_answers_as_its_conversion(converted):
    from hrm_megatron.generate.load import opened
    from hrm_megatron.generate.weights import take_weights

    found = []
    for folder in (converted, ROOT / "tests" / "golden" / "native_ckpt"):
        with opened(folder) as checkpoint:
            found.append(take_weights(checkpoint.architecture, checkpoint.weights()))
    assert torch.equal(found[0].head.dense, found[1].head.dense)
    for ours, theirs in zip(found[0].stacks["L"], found[1].stacks["L"], strict=True):
        assert torch.equal(ours.gqkv.dense, theirs.gqkv.dense) and torch.equal(ours.mlp_out.dense, theirs.mlp_out.dense)
