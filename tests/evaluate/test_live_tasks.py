"""--eval-tasks: what a model answers while it trains is what tools/evaluate.py makes of its checkpoint."""
import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from hrm_megatron.config import ConfigError
from tests.evaluate.conftest import CONTEXT, TOKENIZER
from tests.training.conftest import scalars

GOOD = dict(eval_tasks=["gsm8k", "boolq"], eval_tasks_limit=None, eval_tasks_new_tokens=6, tokenizer_model=TOKENIZER,
            seq_length=CONTEXT, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, context_parallel_size=1,
            use_torch_fsdp2=False, use_megatron_fsdp=False, fp8_param_gather=False, fp4_param_gather=False,
            skip_train=False)
RIGHT, STEPS = "7", 24


def arguments(data, **changes):
    return argparse.Namespace(**dict(GOOD, eval_tasks_data=data) | changes)


def test_a_live_model_answers_as_its_checkpoint_does(tool, checkpoint, data, tmp_path):
    from hrm_megatron.evaluate.live_tasks import open_tasks
    from hrm_megatron.evaluate.report import as_json
    from hrm_megatron.generate.load import load_model, open_checkpoint

    assert tool("--output", tmp_path, "--max-new-tokens", "6", tasks=GOOD["eval_tasks"])[0] == 0
    want = json.loads((tmp_path / "results.json").read_text())["tasks"]
    found = open_tasks(arguments(data), True).results(load_model(open_checkpoint(checkpoint)))
    assert json.loads(json.dumps(as_json(found, {})["tasks"])) == want
    assert want["boolq"]["metrics"]["acc"]["value"] > 0  # an invalid answer counts half


def test_memory_decides_how_many_answers_there_are_at_once_and_training_goes_on_without(
        single_rank, checkpoint, data, monkeypatch, caplog):
    from hrm_megatron.evaluate import live_tasks
    from hrm_megatron.generate import cache, session
    from hrm_megatron.generate.load import load_model, open_checkpoint

    model, tasks = load_model(open_checkpoint(checkpoint)), live_tasks.open_tasks(arguments(data), True)
    want, rows, stock = tasks.results(model), [], session.Session.answer

    def answer(self, requests, max_rows, *rest):
        rows.append(max_rows)
        return stock(self, requests, max_rows, *rest)
    monkeypatch.setattr(session.Session, "answer", answer)

    def results(fits):
        rows.clear()
        monkeypatch.setattr(cache.CacheSize, "fits", fits)
        return tasks.results(model)
    asked = iter(range(100))
    assert results(lambda self, free: next(asked) >= 3) == want and rows == [4, 32]  # 32, 16 and 8 at once do not fit
    assert results(lambda self, free: False) == [] and not rows
    assert caplog.text.count("not answered: on rank 0 the memory that training leaves free") == 2


def test_training_goes_on_where_the_weights_of_a_decoder_do_not_fit(
        single_rank, checkpoint, data, monkeypatch, caplog):
    from hrm_megatron.evaluate import live_tasks
    from hrm_megatron.generate.load import load_model, open_checkpoint

    def full(*_):
        raise torch.OutOfMemoryError
    model, tasks = load_model(open_checkpoint(checkpoint)), live_tasks.open_tasks(arguments(data), True)
    monkeypatch.setattr(live_tasks, "decoder_of", full)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=256 << 20))
    assert tasks.results(model) == []
    assert "tasks: not answered: on rank 0 the memory that training leaves free holds no copy" in caplog.text


@pytest.mark.parametrize(("changes", "validates", "message"), [
    (dict(eval_tasks=None), True, "--eval-tasks-data .*: has no effect without --eval-tasks"),
    (dict(eval_tasks=["gsm9k"]), True, "task 'gsm9k': unknown; choose from gsm8k"),
    (dict(tensor_model_parallel_size=2), True, "every rank must hold the whole model, and --tensor-model-parallel-size "
                                               "is 2; evaluate its checkpoints with tools/evaluate.py"),
    (dict(pipeline_model_parallel_size=4), True, "--pipeline-model-parallel-size is 4"),
    (dict(use_torch_fsdp2=True), True, "gsm8k boolq is incompatible with --use-torch-fsdp2"),
    (dict(fp4_param_gather=True), True, "incompatible with --fp8-param-gather"),
    (dict(skip_train=True), True, "there is no training; use tools/evaluate.py$"),
    ({}, False, "there is none; use tools/evaluate.py, or give examples to validate on and --eval-iters"),
    (dict(tokenizer_model=None), True, "needs --tokenizer-model"),
    (dict(eval_tasks=["boolq"]), True, "--eval-tasks-new-tokens 6: no task of boolq has free answers"),
    (dict(eval_tasks=["hellaswag"], eval_tasks_new_tokens=None), True, "10 shots are wanted"),
])
def test_what_cannot_be_answered_during_training_is_refused(data, changes, validates, message):
    from hrm_megatron.evaluate.live_tasks import open_tasks

    with pytest.raises(ConfigError, match=message):
        open_tasks(arguments(data, **changes), validates)


@pytest.mark.slow
def test_two_ranks_share_the_questions_and_training_is_bitwise_the_same(launch, single_rank, tmp_path):
    """The model learns one answer, right for two thirds of the rows; the last result is that of the checkpoint's EMA
    alone."""
    from hrm_megatron.checkpoint.dcp import DCPFolder
    from hrm_megatron.checkpoint.folders import find_iteration
    from hrm_megatron.data.indexed_examples import IndexedExamplesWriter
    from hrm_megatron.data.tokenizer import TextTokenizer
    from hrm_megatron.evaluate.live_tasks import open_tasks
    from hrm_megatron.generate.load import load_model, open_checkpoint

    tokenizer, rows = TextTokenizer(TOKENIZER), tmp_path / "rows" / "gsm8k"
    with IndexedExamplesWriter(tmp_path / "store", tokenizer) as writer:
        for i in range(200):
            writer.add(tokenizer.encode_prefix("synth,cot", f"Is it {i}?"), tokenizer.encode_response(RIGHT))
    rows.mkdir(parents=True)
    (rows / "test.jsonl").write_text("".join(json.dumps(dict(
        question=f"Is it {i}?", answer=f"#### {RIGHT if i % 3 else 5}")) + "\n" for i in range(9)))
    flags = ["--eval-tasks", "gsm8k", "--eval-tasks-data", rows.parent, "--eval-tasks-new-tokens", 4]

    def train(folder, *more):
        run = launch("--data-path", tmp_path / "store", "--split", "90,10,0", "--tokenizer-model", TOKENIZER,
                     "--num-layers", 1, "--hidden-size", 32, "--num-attention-heads", 2, "--seq-length", 32,
                     "--global-batch-size", 4, "--micro-batch-size", 2, "--train-iters", STEPS, "--lr", 2e-2,
                     "--ema-decay", 0.5, "--eval-interval", 8, "--eval-iters", 1, "--save", folder / "checkpoints",
                     "--tensorboard-dir", folder / "log", *more, ranks=2)
        assert run.code == 0, run.output[-5000:]
        return run
    run = train(tmp_path / "with", *flags)
    train(tmp_path / "without")
    one, other = (DCPFolder(find_iteration(tmp_path / name / "checkpoints")) for name in ("with", "without"))
    assert not [key for key in one.shapes() if not torch.equal(one.tensor(key), other.tensor(key))]

    found = scalars(tmp_path / "with" / "log", "gsm8k acc tasks EMA")
    assert list(found) == [8, 16, 24] and found[24] == pytest.approx(2 / 3)
    [result] = open_tasks(arguments(rows.parent, eval_tasks=["gsm8k"], eval_tasks_new_tokens=4, seq_length=32),
                          True).results(load_model(open_checkpoint(tmp_path / "with" / "checkpoints")))
    assert result.metrics["acc"].value == pytest.approx(found[24])
    assert result.metrics["acc"].stderr == pytest.approx(
        scalars(tmp_path / "with" / "log", "gsm8k acc stderr tasks EMA")[24])
    assert "step 24/24  tasks EMA: GSM8K acc 66.7 ± 16.7  in " in run.output
    assert run.output.count("tasks EMA: ") == 3  # once a validation, from one rank, and not again at the end
