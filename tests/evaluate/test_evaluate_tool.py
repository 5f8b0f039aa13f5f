"""tools/evaluate.py from made-up rows of the tasks' schemas to its reports, in one process."""
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.evaluate.report import how_answered
from hrm_megatron.evaluate.tasks import TASKS
from tests.evaluate.conftest import DATE, HERE, TOKENIZER, made_rows

FEW_SHOTS = [f"--shots={name}={number}" for name, number in dict(
    drop=0, mmlu=2, arc_challenge=2, hellaswag=1, winogrande=2, boolq=1).items()]


def records(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_all_tasks_end_to_end(tool, checkpoint, tmp_path):
    from hrm_megatron.data.tokenizer import TextTokenizer
    from hrm_megatron.generate.decode import generate
    from hrm_megatron.generate.load import load_model, open_checkpoint

    status, out, errors = tool("--output", tmp_path, "--max-new-tokens", "6", "--limit", "4", *FEW_SHOTS)
    assert (status, errors) == (0, [])
    assert [line.split(":")[0] for line in out.splitlines()] == [TASKS[name].title for name in HERE]
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["tasks"]) == HERE and "not measured here" in found["published"]
    table = (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").stat().st_size > 1000
    for name in HERE:
        result = found["tasks"][name]
        assert result["questions"] == 4 and result["too_long"] == 0, name
        row = next(line for line in table.splitlines() if line.startswith(f"| {TASKS[name].title} |"))
        assert row.endswith("|  |" if TASKS[name].published is None else f"| {TASKS[name].published} |")

    # What was asked and answered, by the other way to the same answers.
    tokenizer, model = TextTokenizer(TOKENIZER), load_model(open_checkpoint(checkpoint))

    def answer(condition, prompt, new_tokens):
        [ids] = generate(model, [tokenizer.encode_prefix(condition, prompt)], tokenizer.eoa, tokenizer.vocab_size,
                         new_tokens)
        return tokenizer.decode([i for i in ids if i != tokenizer.eoa])
    assert records(tmp_path, "gsm8k")[2]["responses"] == [answer("synth,cot", "What is 2 plus 1?", 6)]
    choices = "A. one\nB. two\nC. three\nD. four\nAnswer:"
    shots = "".join(f"Which is {n}?\n{choices} {'ABCD'[n % 4]}\n\n" for n in (1, 3))
    assert records(tmp_path, "mmlu")[3]["responses"] == [answer("direct", f"{shots}Which is 3?\n{choices}", 1)]
    right = [1.0 if text.strip().upper() == "ABCD"[n] else 0.25 * (text.strip().upper() not in tuple("ABCD"))
             for n, text in enumerate(record["responses"][0] for record in records(tmp_path, "arc_challenge"))]
    assert found["tasks"]["arc_challenge"]["metrics"]["acc"]["value"] == sum(right) / 4


def test_an_interrupted_run_goes_on_and_other_settings_are_refused(tool, tmp_path, monkeypatch):
    from hrm_megatron.generate.answer_file import AnswerFile
    from hrm_megatron.program import Stopped

    flags = ("--max-new-tokens", "4", "--batch-size", "2", "--samples", "3", "--temperature", "2")
    tasks = ["gsm8k", "mmlu_pro"]
    assert tool("--output", tmp_path / "whole", *flags, tasks=tasks)[0] == 0
    written, stock = [], AnswerFile.write

    def write(self, record):
        if len(written) == 7:  # within the second task
            raise Stopped(130)
        written.append(record)
        stock(self, record)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(AnswerFile, "write", write)
        tool("--output", tmp_path / "run", *flags, tasks=tasks)
    status, _, [error] = tool("--output", tmp_path / "run", *flags, "--condition", "gsm8k=direct", tasks=tasks)
    assert status == 1 and "gsm8k.settings.json: was begun with condition='synth,cot', not 'direct'" in error
    assert tool("--output", tmp_path / "run", *flags, "--seed", "5", tasks=tasks)[0] == 1
    [error] = tool("--output", tmp_path / "run", *flags, "--limit", "2", tasks=tasks)[2]
    assert "was begun with questions='" in error and "which --limit, --data and --shots decide" in error
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "write", lambda self, record: written.append(record) or stock(self, record))
        assert tool("--output", tmp_path / "run", *flags, tasks=tasks)[0] == 0
    assert len(written) == 10  # nothing was answered twice
    for name in ("gsm8k.jsonl", "mmlu_pro.jsonl", "results.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]["gsm8k"]
    assert list(found["metrics"]) == ["acc", "acc_mean"] and found["samples"] == 3


def test_answers_of_other_weights_in_the_same_folder_are_no_answers_of_these(tool, tmp_path, monkeypatch):
    from hrm_megatron.convert.checkpoint import Checkpoint

    command = "--output", tmp_path, "--limit", "2", "--shots=boolq=0"
    assert tool(*command, tasks=["boolq"])[0] == 0
    answers, stock = (tmp_path / "boolq.jsonl").read_bytes(), Checkpoint.weights

    def trained_on(self, kind):
        for number, (name, tensor) in enumerate(stock(self, kind)):
            yield name, tensor * (1.001 if number == 3 else 1)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "weights", trained_on)
        status, _, [error] = tool(*command, tasks=["boolq"])
    assert status == 1 and "boolq.settings.json: was begun with fingerprint='" in error
    assert tool(*command, tasks=["boolq"])[0] == 0 and (tmp_path / "boolq.jsonl").read_bytes() == answers


def test_reports_keep_the_tasks_of_an_earlier_call_and_say_what_made_each(tool, tmp_path):
    assert tool("--output", tmp_path, "--limit", "2", "--shots=boolq=1", tasks=["boolq"])[0] == 0
    [boolq] = json.loads((tmp_path / "results.json").read_text())["tasks"].values()
    assert (boolq["limit"], boolq["shots"], boolq["max_new_tokens"]) == (2, 1, 1)
    assert tool("--output", tmp_path, "--max-new-tokens", "3", "--condition", "gsm8k=direct", "--seed", "5",
                tasks=["gsm8k"])[0] == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["tasks"]) == ["gsm8k", "boolq"] and found["tasks"]["boolq"] == boolq
    assert found["tasks"]["gsm8k"]["max_new_tokens"] == 3 and found["tasks"]["gsm8k"]["limit"] is None
    assert not found["settings"].keys() & {"max_new_tokens", "stop", "logprobs"}
    text = (tmp_path / "results.md").read_text()
    assert "Weights: ema, iteration 7, float32; greedy answers; cycles as in training. Percent" in text
    assert [line for line in text.splitlines() if line.startswith("- ") and "were cut off" not in line] == [
        "- GSM8K: condition direct; the reference has synth,cot.",
        "- GSM8K: answers of at most 3 tokens; the reference has what the context leaves room for.",
        "- GSM8K: context of 320, the model's; the reference has 3072.",
        "- BoolQ: only the first 2 questions of the split.",
        "- BoolQ: shots: 1; the reference has 5.", "- BoolQ: context of 320, the model's; the reference has 4096."]
    status, _, [error] = tool("--output", tmp_path, "--h-cycles", "1", tasks=["mmlu_pro"])
    assert status == 1 and "results.json: was begun with h_cycles=None, not 1; go on with that, choose" in error
    assert "GSM8K would fall out of it" in error and not (tmp_path / "mmlu_pro.jsonl").exists()
    (tmp_path / "results.json").write_text('{"settings": {}}')
    status, _, [error] = tool("--output", tmp_path, tasks=["mmlu_pro"])
    assert status == 1 and "results.json: not what this version writes (KeyError('tasks')); move it away" in error


def test_a_limit_that_leaves_nothing_out_is_not_told(tool, tmp_path):
    """5 rows are there."""
    for limit, told in ((4, 4), (5, None)):
        folder = tmp_path / str(limit)
        assert tool("--output", folder, "--limit", limit, "--shots=boolq=0", tasks=["boolq"])[0] == 0
        [boolq] = json.loads((folder / "results.json").read_text())["tasks"].values()
        assert (boolq["questions"], boolq["limit"]) == (limit, told)
        assert ("only the first" in (folder / "results.md").read_text()) == bool(told)


@pytest.mark.parametrize(("flags", "sentence"), [
    (dict(), "greedy answers; cycles as in training."),
    (dict(samples=8, sampling=dict(temperature=0.6, top_p=0.9, seed=3)),
     "the majority of 8 answers at temperature 0.6, top-p 0.9, seed 3; cycles as in training."),
    (dict(sampling=dict(temperature=1.0, top_p=1.0, seed=3), h_cycles=3, l_cycles=2, exit_threshold=0.1),
     "answers at temperature 1, top-p 1, seed 3; 3 H cycles x 2 L cycles, exit below 0.1."),
])
def test_a_sentence_says_how_the_model_answered(flags, sentence):
    identity = dict(weights="ema", iteration=7, dtype="float32", samples=1, sampling=dict(temperature=0.0),
                    h_cycles=None, l_cycles=None, exit_threshold=None)
    assert how_answered({**identity, **flags}) == f"Weights: ema, iteration 7, float32; {sentence}"


def test_answers_go_on_after_the_checkpoint_has_moved(tool, checkpoint, tmp_path):
    command = "--output", tmp_path / "out", "--limit", "2", "--shots=boolq=0"
    assert tool(*command, tasks=["boolq"])[0] == 0
    shutil.copytree(checkpoint, tmp_path / "moved")
    assert tool(*command, "--load", tmp_path / "moved", tasks=["boolq"])[0] == 0


@pytest.mark.parametrize(("line", "reason"), [
    ('{"place": "x", "responses', "JSONDecodeError("),
    ("3", "TypeError("),
    (dict(responses=["A", "B"]), "responses is ['A', 'B'], not 1 text"),
    (dict(prompt_tokens=3), "prompt_tokens is 3, not "),
    (dict(finish=[None]), "finish is [None], not 1 text"),
])
def test_a_line_that_is_no_answer_is_named(tool, tmp_path, line, reason):
    command = "--output", tmp_path, "--limit", "2", "--shots=boolq=0"
    assert tool(*command, tasks=["boolq"])[0] == 0
    path = tmp_path / "boolq.jsonl"
    first, second = path.read_text().splitlines()
    changed = json.dumps(json.loads(second) | line) if isinstance(line, dict) else line
    path.write_text(f"{first}\n{changed}\n")
    status, _, [error] = tool(*command, tasks=["boolq"])
    assert status == 1 and f"{path}:2: is not the answer to " in error and reason in error
    assert error.endswith(f"it was changed, remove {path} to answer again")


def test_prompts_that_do_not_fit_lose_shots_then_count_as_invalid(tool, data, tmp_path):
    rows = tmp_path / "data"
    (rows / "mmlu").mkdir(parents=True)
    made = [made_rows(0)["mmlu"] for _ in range(5)]
    (rows / "mmlu" / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    made = [dict(made[0], question="x" * length) for length in (1, 60, 400)]
    (rows / "mmlu" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    status, out, _ = tool("--output", tmp_path / "out", tasks=["mmlu"], rows=rows)
    asked = records(tmp_path / "out", "mmlu")
    assert status == 0 and "1 too long" in out
    assert [record["shots"] for record in asked] == [5, 3, 3]
    assert [record["finish"] == ["too long"] for record in asked] == [False, False, True]
    found = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["mmlu"]
    assert (found["too_long"], found["fewer_shots"]) == (1, 2)
    assert "1 prompts do not fit the context" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(("tasks", "flags", "message"), [
    (["gsm9k"], [], "task 'gsm9k': unknown; choose from gsm8k, math, drop"),
    (["gsm8k"], ["--condition", "gsm8k=loud"], "task gsm8k: unknown tag 'loud'"),
    (["gsm8k"], ["--condition", "drop=direct"], "--condition drop=...: that task is not among --tasks"),
    (["gsm8k"], ["--condition", "direct"], "--condition direct: write TASK=VALUE"),
    (["gsm8k"], ["--samples", "2"], "--samples 2: greedy answers are all the same; give a --temperature"),
    (["gsm8k"], ["--top-p", "0.9", "--data", "nowhere"], "top_p, top_k and min_p are without effect at temperature=0"),
    (["gsm8k"], ["--limit", "0"], "--limit 0: must be at least 1"),
    (["mmlu"], ["--shots", "mmlu=many"], "--shots mmlu=many: not a number of shots"),
    (["mmlu"], ["--shots", "mmlu=9"], "task mmlu: 9 shots are wanted, split 'dev' has 3 rows of 'sums0'"),
    (["drop"], ["--shots", "drop=4"], "--shots drop=4: DROP has 3; give at most that"),
    (["boolq"], ["--tasks", "drop", "boolq"], "task 'boolq': is named twice; name it once"),
    (["boolq"], ["--shots", "boolq=1", "--shots", "boolq=2"], "--shots boolq=2: --shots boolq=1 is given too; leave"),
    (["boolq"], ["--tasks", "mmlu", "--max-new-tokens", "3"], "3: no task of mmlu, boolq has free answers"),
    (["boolq"], ["--max-new-tokens", "3"], "--max-new-tokens 3: no task of boolq has free answers"),
])
def test_bad_input_is_one_line(tool, tmp_path, tasks, flags, message):
    status, out, [error] = tool("--output", tmp_path / "out", *flags, tasks=tasks)
    assert (status, out) == (1, "") and message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "row", "message"), [
    ("dev", {}, "gsm8k: no split 'test' (there is dev.jsonl); put its rows there as test.jsonl"),
    ("test", dict(question="x"), "test.jsonl:1: no field 'answer' (str), which GSM8K has; the row has question"),
    ("test", dict(question=3, answer=""), "test.jsonl:1: question=3 is not of type str, as in GSM8K"),
    ("test", dict(question="x", answer="3"), ""),
    ("test", dict(question="x", answer="#### x"), "test.jsonl:1: answer ends with 'x', no whole number"),
    ("test", dict(question="x\ud800", answer="#### 3"), r"1: question 'x\ud800': not UTF-8 at character 2; correct"),
])
def test_a_bad_row_is_named(tool, tmp_path, name, row, message):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    status, _, errors = tool("--output", tmp_path / "out", "--max-new-tokens", "1", tasks=["gsm8k"], rows=tmp_path)
    assert status == bool(message) and (message in errors[0] if message else not errors)


@pytest.mark.parametrize(("task", "change", "place"), [
    ("mmlu_pro", dict(options=["a", "\ud800"]), "options 2"), ("mmlu_pro", dict(category="\udfff"), "category"),
    ("arc_challenge", dict(choices=dict(text=["\ud800"], label=["A"])), "choices.text 1"),
    ("drop", dict(answer=dict(number="", spans=["\ud800"], date=DATE)), "answer.spans 1"),
])
def test_half_a_character_is_named_wherever_it_is(tmp_path, task, change, place):
    """Also in what only the reports have."""
    from hrm_megatron.evaluate.rows import read_items

    (tmp_path / task).mkdir()
    path = tmp_path / task / f"{TASKS[task].source.split}.jsonl"
    path.write_text(json.dumps(made_rows(0)[task]) + "\n" + json.dumps(made_rows(1)[task] | change) + "\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}:2: {place} '\\ud")):
        read_items(TASKS[task], tmp_path)


def test_math_without_math_verify_is_refused_before_anything_is_answered(tool, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    status, _, [error] = tool("--output", tmp_path / "out", tasks=["math"])
    assert status == 1 and "pip install 'hrm_megatron[evaluate]'" in error


@pytest.mark.parametrize("kind", [ConnectionError, RuntimeError, type("DatasetsError", (Exception,), {})])
def test_what_the_hub_does_not_give_is_one_line(monkeypatch, kind):
    """A data set that is still a script is a RuntimeError, a broken one an error of datasets' own."""
    def load_dataset(*_, **__):
        raise kind("scripts are no longer supported,\nbut found drop.py")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
        load_dataset=load_dataset, __spec__=True, exceptions=SimpleNamespace(
            DatasetsError=kind if kind.__name__ == "DatasetsError" else ConnectionError)))
    from hrm_megatron.evaluate.rows import read_items

    with pytest.raises(ConfigError, match="EleutherAI/drop .*supported, but found drop.py.; give --data"):
        read_items(TASKS["drop"], None, None)
