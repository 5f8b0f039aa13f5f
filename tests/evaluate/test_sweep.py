"""tools/sweep_cycles.py: every line of its table against the tools that answer at one depth."""
import json
import sys

import pytest

from tests.evaluate.conftest import CONTEXT, TOKENIZER
from tests.tools import load_tool

QUESTIONS = ["What is 7 + 1?", "Count.", "Which is it, the first or the second?", "No"]


@pytest.fixture(scope="module")
def sweep_module():
    return load_tool("sweep_cycles")


@pytest.fixture
def swept(sweep_module, checkpoint, monkeypatch, capsys, tmp_path):
    """Call the sweep with these flags and return (status, stdout, stderr, its JSON)."""
    def call(*flags):
        path = tmp_path / "cycles.json"
        monkeypatch.setattr(sys, "argv", ["sweep_cycles.py", "--load", str(checkpoint), "--tokenizer-model",
                                          str(TOKENIZER), "--repeats", "1", "--json", str(path), *map(str, flags)])
        status = sweep_module.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err, json.loads(path.read_text()) if path.exists() else None
    return call


def answers_at(checkpoint, h_cycles, exit_threshold=None):
    from hrm_megatron.generate.questions import Question
    from hrm_megatron.generate.session import Answering, Session

    session = Session(checkpoint, Answering(8, h_cycles=h_cycles, exit_threshold=exit_threshold), TOKENIZER)
    asked = [Question("here", "direct", question) for question in QUESTIONS]
    return [samples[0] for samples in session.answer(session.requests(asked), 32, lambda line: None)]


def test_a_right_answer_is_in_the_form_that_answers_have(checkpoint, tmp_path):
    from hrm_megatron.evaluate.sweep import exact_questions
    from hrm_megatron.generate.session import Answering, Session

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(dict(instruction="q", response="cafe\u0301")) + "\n")
    questions = exact_questions(rows, "direct", Session(checkpoint, Answering(8), TOKENIZER))
    assert questions.scores(["caf\u00e9"]) == [1.0] and questions.scores(["cafe"]) == [0.0]


def test_exact_answers_at_every_depth(swept, checkpoint, tmp_path):
    """Right answers are those of one H cycle, so that depth 1 is right always and others where they say the same."""
    one = [answer.text for answer in answers_at(checkpoint, 1)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(dict(instruction=question, response=text)) + "\n"
                            for question, text in zip(QUESTIONS, one, strict=True)))
    status, out, err, found = swept("--input", rows, "--h-cycles", 1, "--h-cycles", 3, "--exit-threshold", 1e9, 1e-9,
                                    "--png", tmp_path / "cycles.png")
    assert status == 0, err
    assert [(point["h_cycles"], point["l_cycles"], point["exit_threshold"]) for point in found["points"]] == [
        (2, 3, None), (1, 3, None), (3, 3, None), (3, 3, 1e9), (3, 3, 1e-9)]
    trained, first, third, ended, never = found["points"]
    assert [point["mean_h_cycles"] for point in found["points"]] == [2, 1, 3, 1, 3]
    for depth, point in ((2, trained), (3, third)):
        same = [answer.text == text for answer, text in zip(answers_at(checkpoint, depth), one, strict=True)]
        assert point["accuracy"]["value"] == sum(same) / 4
    for name in ("accuracy", "difference", "tokens"):
        assert ended[name] == first[name] and never[name] == third[name]
    assert first["accuracy"]["value"] > trained["accuracy"]["value"]
    assert first["difference"]["value"] == pytest.approx(first["accuracy"]["value"] - trained["accuracy"]["value"])
    assert not found["settings"].keys() & {"max_new_tokens", "stop", "logprobs", "h_cycles"}
    assert found["answers"] == 4 and all(point["seconds"] > 0 for point in found["points"])
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(lines) == 6 and lines[1].startswith("| 2 | 3 |  | 2.00 | ")
    assert (tmp_path / "cycles.png").read_bytes()[:4] == b"\x89PNG" and not list(tmp_path.glob(".*"))


def test_a_task_is_measured_as_evaluate_does(swept, tool, data, tmp_path):
    flags = ("--data", data, "--limit", "4")
    status, _, err, found = swept("--task", "mmlu_pro", *flags, "--h-cycles", 1)
    assert status == 0, err
    for depth, point in zip((2, 1), found["points"], strict=True):
        folder = tmp_path / str(depth)
        assert tool("--output", folder, "--limit", "4", "--h-cycles", depth, tasks=["mmlu_pro"])[0] == 0
        [metric] = json.loads((folder / "results.json").read_text())["tasks"]["mmlu_pro"]["metrics"].values()
        assert point["accuracy"] == metric


def test_questions_none_of_which_fits_are_refused(swept, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(dict(question="long " * CONTEXT, answer="#### 1")) + "\n")
    status, out, err, _ = swept("--task", "gsm8k", "--data", tmp_path, "--h-cycles", 1)
    assert (status, out) == (1, "") and "gsm8k: none of its 1 questions fits into the model's context" in err


@pytest.mark.parametrize(("flags", "message"), [
    (["--task", "mmlu_pro"], "nothing to compare: the only depth is that of training"),
    (["--task", "mmlu_pro", "--h-cycles", 2, "--l-cycles", 3], "nothing to compare"),
    (["--task", "mmlu_pro", "--h-cycles", 0], "h_cycles=0: must be at least 1"),
    (["--task", "mmlu_pro", "--h-cycles", 1, "--exit-threshold", 0.1], "exit threshold 0.1: has no effect"),
    (["--task", "mmlu_pro", "--h-cycles", 3, "--exit-threshold", -1], "exit_threshold=-1.0: must be a number above 0"),
    (["--task", "mmlu_pro", "--repeats", 0], "--repeats 0: must be at least 1"),
    (["--input", "nope.jsonl", "--h-cycles", 1], "--input nope.jsonl: is no file; give a jsonl file of questions"),
    (["--input", "ROWS", "--limit", 2], "--limit: is about a --task, and --input is given"),
    (["--input", "ROWS", "--h-cycles", 1], "rows.jsonl:1: no field 'response' with the right answer"),
    (["--input", "HALF", "--h-cycles", 1], r"rows.jsonl:1, response 'x\ud800': not UTF-8 at character 2; correct it"),
    (["--task", "mmlu_pro", "--png", "cycles.pdf"], "--png cycles.pdf: the name of this file must end with .png"),
    (["--task", "mmlu_pro", "--png", "."], "--png .: the name of this file must end with .png"),
])
def test_bad_input_is_refused_in_one_line(swept, data, tmp_path, flags, message):
    rows = tmp_path / "rows.jsonl"
    response = dict(response="x\ud800") if "HALF" in flags else {}
    rows.write_text(json.dumps(dict(instruction="What?") | response) + "\n")
    flags = [str(rows) if flag in ("ROWS", "HALF") else flag for flag in flags]
    status, out, err, found = swept(*flags, *(["--data", data] if "--task" in flags else []))
    assert (status, out, found) == (1, "", None)
    assert [line for line in err.splitlines() if line.startswith("error: ")] and message in err
