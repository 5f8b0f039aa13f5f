"""tools/generate.py as a user calls it: answers on stdout, one line on stderr for everything that is wrong."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hrm_megatron.config import Architecture

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "generate.py"
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"
QUESTIONS = ["What is 7 plus 5?", "Name the tens digit of 7543."]


@pytest.fixture(scope="module")
def checkpoints(single_rank, tmp_path_factory):
    """A Megatron checkpoint of a random model over the golden tokenizer's vocabulary, raw and EMA weights unlike."""
    from hrm_megatron.convert.checkpoint import PARTS, Checkpoint, Training
    from hrm_megatron.convert.to_megatron import write_megatron
    from hrm_megatron.data.tokenizer import TextTokenizer

    vocab_size = TextTokenizer(TOKENIZER).vocab_size
    assert vocab_size != 256
    generator = torch.Generator().manual_seed(3)

    def read(part, entry):
        tensor = torch.randn(entry.shape, generator=generator) * 0.7  # attention must matter
        return tensor if entry.trained else tensor.bfloat16()

    folder = tmp_path_factory.mktemp("tool") / "checkpoints"
    write_megatron(Checkpoint(Path("random"), Architecture(1, 24, 3, 40, vocab_size), Training(seq_length=48,
                              tokens_per_step=96, total_steps=9), 7, 5, frozenset(PARTS), read), folder)
    return folder


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
    spec = importlib.util.spec_from_file_location("generate_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*flags, load=checkpoints, tokenizer=TOKENIZER, prompt=("--prompt", QUESTIONS[0])):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--load", str(load), "--tokenizer-model", str(tokenizer),
                                          *map(str, prompt), "--max-new-tokens", "12", *flags])
        status = module.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return call


def test_a_command_prints_the_answer_alone(checkpoints, expected):
    done = subprocess.run([sys.executable, TOOL, "--load", checkpoints, "--tokenizer-model", TOKENIZER, "--prompt",
                           QUESTIONS[1], "--max-new-tokens", "12"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, expected(QUESTIONS[1:])), done.stderr
    assert len(done.stdout) > 1
    assert "156 of 256 bytes have no token" in done.stderr  # a warning, and no answer


def test_flags_reach_the_answer(tool, expected):
    from hrm_megatron.generate.decode import Sampling

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


def test_a_prompt_ends_at_line_feeds_only(tool, expected, tmp_path):
    questions = ["What is\u20287?", "Name\x0bthe\x0cten\x85s.", "And?"]
    (tmp_path / "prompts.txt").write_bytes(("\ufeff" + "\r\n".join(questions) + "\n").encode())
    status, out, _ = tool(prompt=("--prompt-file", tmp_path / "prompts.txt"))
    assert (status, out) == (0, expected(questions))


def test_answers_that_hold_line_ends_stay_one_record(tool, tmp_path, monkeypatch):
    from hrm_megatron.data.tokenizer import TextTokenizer

    answer = "two\nlines\u2028and é"
    monkeypatch.setattr(TextTokenizer, "decode", lambda self, ids: answer)
    (tmp_path / "prompts.txt").write_text("\n".join(QUESTIONS))
    flags = dict(prompt=("--prompt-file", tmp_path / "prompts.txt"))
    status, out, err = tool("--jsonl", "--condition", "cot", **flags)
    assert (status, err.count("--jsonl")) == (0, 0)
    assert [json.loads(line) for line in out.splitlines()] == [
        dict(condition="cot", instruction=question, response=answer) for question in QUESTIONS]
    status, out, err = tool(**flags)
    assert (status, out) == (0, f"{answer}\n" * 2)
    assert err.endswith("2 of 2 answers hold line ends; --jsonl keeps each on one line\n")


@pytest.mark.parametrize(("flags", "options", "message"), [
    ([], dict(prompt=("--prompt-file", "/dev/null")), "--prompt-file /dev/null: empty; write one instruction per line"),
    ([], dict(prompt=("--prompt", "na\udcefve")), "--prompt 'na\\udcefve': not UTF-8 at character 3"),
    ([], dict(tokenizer="nowhere"), "nowhere: no tokenizer there (No such file or directory); train one with"),
    ([], dict(load="nowhere"), "nowhere/latest_checkpointed_iteration.txt: cannot read"),
    (["--ckpt-step", "3"], {}, "iter_0000003: not there; choose another with --ckpt-step (complete: iter_0000007)"),
    (["--condition", "direct,loud"], {}, "unknown tag 'loud'"),
    (["--temperature", "-1"], {}, "temperature=-1.0: must be 0 (greedy) or positive"),
    (["--temperature", "1", "--top-p", "0"], {}, "top_p=0.0: must be above 0"),
    ([], dict(prompt=("--prompt-file", "nowhere.txt")), "nowhere.txt"),
])
def test_bad_input_is_one_line(tool, tmp_path, monkeypatch, flags, options, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = tool(*flags, **options)
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_tokenizer_of_another_size_is_refused(tool, converted):
    status, out, err = tool(load=converted)
    assert (status, out) == (1, "")
    assert "tests/golden/tokenizer: 286 entries, the checkpoint has 256; give the tokenizer of its training data" in err


def test_prompts_that_are_no_text_are_one_line(tool, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("naïve\n".encode("latin-1"))
    status, out, err = tool(prompt=("--prompt-file", tmp_path / "prompts.txt"))
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("error: ") and "prompts.txt: not UTF-8 (invalid continuation byte at byte 2)" in err
