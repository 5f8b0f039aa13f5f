"""Training over a store with a held-out part: what is logged is what an independent model computes."""
import re

import pytest
import torch

from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.checkpoint.folders import find_iteration, read_run
from hrm_megatron.config import ConfigError
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.data.indexed_examples import IndexedExamples, IndexedExamplesWriter
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.training.data import open_sources
from hrm_megatron.training.evaluation import settle_evaluation
from hrm_megatron.training.own_flags import full_parser
from tests.stores import split_examples
from tests.training.conftest import GOLDEN, scalars

COUNT, SEED, SPLIT = 60, 7, "85,15,0"


def example(tokenizer, i):
    return (tokenizer.encode_prefix("direct", "x" * (i % 7) + str(i)),
            tokenizer.encode_response("a" if i % 4 else "bc"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Sixty different questions; the answer is mostly the same, so that a few steps get some of them exactly right."""
    tokenizer = TextTokenizer(GOLDEN / "tokenizer")
    prefix = tmp_path_factory.mktemp("store") / "store"
    with IndexedExamplesWriter(prefix, tokenizer) as writer:
        for i in range(COUNT):
            writer.add(*example(tokenizer, i))
    return prefix


def parts_of(store, split):
    return split_examples(COUNT, split, SEED, IndexedExamples(store).prompt_keys())


@pytest.fixture(scope="module")
def trained(store, launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run = launch("--data-path", store, "--split", SPLIT, "--tokenizer-model", GOLDEN / "tokenizer", "--seed", SEED,
                 "--num-layers", 1, "--hidden-size", 32, "--num-attention-heads", 2, "--seq-length", 64,
                 "--global-batch-size", 4, "--micro-batch-size", 2, "--train-iters", 16, "--lr", 2e-2,
                 "--ema-decay", 0.5, "--eval-interval", 8, "--eval-iters", 3, "--log-interval", 4,
                 "--save", folder / "checkpoints", "--tensorboard-dir", folder / "log", ranks=2)
    assert run.code == 0, run.output
    return folder, run


def scores_by_transformers(folder, example):
    """(sum of losses, labels, right labels) of one example by transformers' model of the raw weights."""
    from transformers import HrmTextForCausalLM

    model = HrmTextForCausalLM.from_pretrained(folder).eval()
    prefix, target = (torch.tensor(part.astype(int)) for part in example)
    ids = torch.cat([prefix, target[:-1]])[None]
    kinds = (torch.arange(ids.shape[1]) < len(prefix)).long()[None]
    with torch.no_grad():
        logits = model(input_ids=ids, token_type_ids=kinds).logits[0, len(prefix) - 1:]
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
    return loss, len(target), int((logits.argmax(-1) == target).sum())


def test_validation_is_what_transformers_computes(trained, store, tmp_path):
    folder, _ = trained
    convert(Conversion(folder / "checkpoints", "megatron", tmp_path / "hf", "hf", weights="raw"))
    source = IndexedExamples(store)
    held_out = parts_of(store, SPLIT).valid
    assert 2 < len(held_out) < 20
    rows = PackedRows(source, 64, SEED, 12, example_ids=held_out, fixed=True)
    shown = [int(i) for row in range(12) for i in rows.plan.locate(row % rows.rows_per_epoch).example_ids]
    assert set(shown) == set(held_out)  # an evaluation sees all of them, some more than once
    scored = {i: scores_by_transformers(tmp_path / "hf", source[i]) for i in set(shown)}
    losses, labels, right = (sum(scored[i][part] for i in shown) for part in range(3))
    exact = sum(scored[i][1] == scored[i][2] for i in shown)
    assert 0 < exact < len(shown) and right < labels

    # fp32 sums over about a hundred labels.
    expected = {"lm loss": losses / labels, "accuracy": right / labels, "exact accuracy": exact / len(shown)}
    for name, value in expected.items():
        assert scalars(folder / "log", f"{name} validation")[16] == pytest.approx(value, abs=2e-6)


def test_every_metric_reaches_tensorboard_and_console(trained, store):
    folder, run = trained
    megatrons_lines = (folder / "checkpoints" / "megatron.rank1.log").read_text()
    for name in ("lm loss", "accuracy", "exact accuracy", "tokens per second", "bp steps", "learning-rate"):
        found = scalars(folder / "log", name)
        assert {4, 8, 12, 16} <= found.keys()
        if name != "learning-rate":
            assert f"| {name}: " in megatrons_lines
    assert set(scalars(folder / "log", "bp steps").values()) <= {2.0, 3.0, 4.0, 5.0, 3.75, 3.5}
    assert all(0 < value < 1e7 for value in scalars(folder / "log", "tokens per second").values())
    for name, ids in zip(("training", "validation"), parts_of(store, SPLIT)[:2], strict=True):
        assert f"{name}: {len(ids)} examples" in run.output


WHOLE_SPLIT = "55,30,15"
MODEL = ["--num-layers", 1, "--hidden-size", 32, "--num-attention-heads", 2, "--micro-batch-size", 2]
WHOLE = ["--split", WHOLE_SPLIT, "--seed", SEED, "--seq-length", 24, "--full-validation"]


@pytest.fixture(scope="module")
def evaluated(store, launch, tmp_path_factory):
    """Two steps of two ranks, whole evaluations after each of them, and a test at the end."""
    folder = tmp_path_factory.mktemp("evaluated")
    run = launch("--data-path", store, *WHOLE, *MODEL, "--num-layers", 2, "--global-batch-size", 4, "--train-iters", 2,
                 "--lr", 2e-2, "--eval-interval", 1, "--save", folder / "checkpoints",
                 "--tensorboard-dir", folder / "log", ranks=2)
    assert run.code == 0, run.output
    return folder, run


@pytest.fixture(scope="module")
def expected(evaluated, store, tmp_path_factory):
    """Means over each example of a part once, by transformers; and the exported model."""
    folder = tmp_path_factory.mktemp("expected") / "hf"
    convert(Conversion(evaluated[0] / "checkpoints", "megatron", folder, "hf", weights="raw"))
    source, parts = IndexedExamples(store), parts_of(store, WHOLE_SPLIT)
    means = {}
    for part, ids in (("validation", parts.valid), ("test", parts.test)):
        scored = [scores_by_transformers(folder, source[int(i)]) for i in ids]
        loss, labels, right = (sum(column) for column in zip(*scored, strict=True))
        means[part] = {"lm loss": loss / labels, "accuracy": right / labels,
                       "exact accuracy": sum(one[1] == one[2] for one in scored) / len(scored)}
        rows = PackedRows(source, 24, SEED, 1, example_ids=ids, fixed=True).rows_per_epoch
        assert (rows % 4 and rows > 4) or part == "test"  # the last iteration is not full
    return means, folder


def printed(run):
    """What the console says of each part at the end: part > name > value."""
    found = re.findall(r"step (\d+)/\1  (validation|test): loss (\S+)  accuracy (\S+)%  exact (\S+)%", run.last_output)
    return {part: {"lm loss": float(loss), "accuracy": float(right) / 100, "exact accuracy": float(exact) / 100}
            for _, part, loss, right, exact in found}


def rounded(means):
    """The means of a part as the console rounds them, and half a digit more for sums in another order."""
    return {name: pytest.approx(mean, abs=6e-5 if name == "lm loss" else 6e-4) for name, mean in means.items()}


def test_a_whole_evaluation_reads_every_row_once_and_a_test_is_logged_as_one(evaluated, expected):
    folder, run = evaluated
    for part, means in expected[0].items():
        for name, value in means.items():  # fp32 sums over about a hundred labels
            assert scalars(folder / "log", f"{name} {part}")[2] == pytest.approx(value, abs=2e-6)
    assert scalars(folder / "log", "lm loss validation").keys() == {1, 2}
    assert scalars(folder / "log", "lm loss test").keys() == {2}
    assert printed(run) == {part: rounded(means) for part, means in expected[0].items()}
    assert "validation: all " in run.output and "test: all " in run.output


@pytest.mark.parametrize("ranks, layout", [
    (1, ["--global-batch-size", 2]), (2, ["--global-batch-size", 4, "--pipeline-model-parallel-size", 2]),
    (2, ["--global-batch-size", 16]),  # one rank has nothing but empty rows
    (2, ["--global-batch-size", 8, "--eval-global-batch-size", 4, "--eval-micro-batch-size", 1])])
def test_a_checkpoint_alone_is_evaluated(launch, evaluated, expected, store, ranks, layout):
    run = launch("--data-path", store, *WHOLE, "--micro-batch-size", 2, "--skip-train", "--use-checkpoint-args",
                 "--load", evaluated[0] / "checkpoints", *layout, ranks=ranks)
    assert run.code == 0, run.output[-3000:]
    assert f"checkpoint: step 2 of {evaluated[0] / 'checkpoints'} is evaluated; nothing is saved" in run.output
    assert "Warning" not in run.output + run.last_output
    assert printed(run) == {part: rounded(means) for part, means in expected[0].items()}


def test_a_converted_model_is_evaluated_on_a_store_of_its_own(launch, expected, store, tmp_path):
    """From transformers' folder, on nothing but a validation store: each example of the part, in another order."""
    means, exported = expected
    source = parts_of(store, WHOLE_SPLIT).valid
    tokenizer = TextTokenizer(GOLDEN / "tokenizer")
    with IndexedExamplesWriter(tmp_path / "valid", tokenizer) as writer:
        for i in map(int, reversed(source)):
            writer.add(*example(tokenizer, i))
    convert(Conversion(exported, "hf", tmp_path / "megatron", "megatron"))
    run = launch("--valid-data-path", tmp_path / "valid", "--full-validation", "--skip-train", "--use-checkpoint-args",
                 "--load", tmp_path / "megatron")
    assert run.code == 0, run.output[-3000:]
    assert printed(run) == {"validation": rounded(means["validation"])}


def test_an_evaluation_of_nothing_is_refused(launch, evaluated, store, tmp_path):
    flags = ["--skip-train", "--use-checkpoint-args", "--data-path", store]
    for more, part in ((["--load", evaluated[0] / "checkpoints", "--split", "100,0,0"],
                        "--skip-train: nothing to evaluate: --split 100,0,0 leaves none of the 60 examples"),
                       (["--load", evaluated[0] / "checkpoints", "--eval-iters", 0],
                        "--skip-train: nothing to evaluate: --eval-iters is 0"),
                       (["--load", tmp_path, "--save", tmp_path, *MODEL, "--seq-length", 32],
                        "--skip-train: no checkpoint to evaluate")):
        run = launch(*flags, *more)
        assert run.code == 2 and len(run.errors) == 1 and part in run.errors[0], run.output


@pytest.mark.parametrize("start", [2, 9])
def test_a_run_that_is_evaluated_late_is_so_to_its_end(launch, store, tmp_path, start):
    run = launch("--data-path", store, "--split", SPLIT, "--seed", SEED, *MODEL, "--seq-length", 64,
                 "--global-batch-size", 2, "--train-iters", 6, "--lr", 2e-2, "--eval-interval", 2, "--eval-iters", 1,
                 "--start-eval-at-iter", start, "--tensorboard-dir", tmp_path)
    assert run.code == 0, run.output[-3000:]
    assert [*scalars(tmp_path, "lm loss validation")] == [*range(start, 6, 2), 6]


def test_epochs_are_whole_where_steps_come_to_have_other_rows(launch, store, tmp_path):
    def train(rows, *flags):
        run = launch("--data-path", store, "--split", SPLIT, "--seed", SEED, *MODEL, "--seq-length", 24, "--lr", 2e-2,
                     "--epochs", 2, "--eval-iters", 0, "--micro-batch-size", 1, "--global-batch-size", rows,
                     "--save", tmp_path, "--load", tmp_path, *flags)
        assert run.code == 0, run.output[-3000:]
        return run.output
    rows = PackedRows(IndexedExamples(store), 24, SEED, 1, example_ids=parts_of(store, SPLIT).train).rows_per_epoch
    train(2, "--exit-interval", 3)
    train(4, "--override-opt-param-scheduler")
    args = read_run(DCPFolder(find_iteration(tmp_path)))[0]["args"]
    assert 0 <= args.consumed_train_samples - 2 * rows < 4
    steps = int(find_iteration(tmp_path).name.removeprefix("iter_"))
    assert f"iteration {steps} of {steps} is done, nothing to train" in train(1)


def test_a_run_that_was_evaluated_more_often_goes_on(launch, trained, store):
    """Its checkpoint says that more validation rows were read than the rest of the run will."""
    run = launch("--data-path", store, "--split", SPLIT, "--seed", SEED, *MODEL, "--seq-length", 64,
                 "--global-batch-size", 4, "--train-iters", 18, "--lr", 2e-2, "--override-opt-param-scheduler",
                 "--ema-decay", 0.5, "--eval-interval", 1000, "--eval-iters", 1, "--load", trained[0] / "checkpoints")
    assert run.code == 0, run.output[-3000:]
    assert printed(run).keys() == {"validation"}


def open_run(*flags):
    """Sources and settled evaluation of a command line."""
    args = full_parser().parse_args([str(flag) for flag in flags])
    sources = open_sources(args)
    return args, settle_evaluation(args, *sources.held_out(), sources.why_no_validation(args.split))


def test_three_in_a_hundred_are_held_out_for_validation_and_none_for_a_test(store):
    args, evaluation = open_run("--data-path", store)
    assert (evaluation.validates, evaluation.tests) == (True, False)
    parts = split_examples(COUNT, "97,3,0", args.seed, IndexedExamples(store).prompt_keys())
    assert args.split == "97,3,0" and open_sources(args).held_out() == (len(parts.valid), 0)
    assert 0 < len(parts.valid) < 6


@pytest.mark.parametrize("name, flags, reason", [
    ("store", ["--split", "100,0,0"], "--split 100,0,0 leaves none of the 60 examples to validate on; give another"),
    ("one", [], "--split 97,3,0 leaves none of the 1 examples to validate on"),
    ("alone", [], "there is nothing to validate on; give --valid-data-path PREFIX")])
def test_nothing_to_validate_on_is_one_line_and_no_evaluation(store, tmp_path, caplog, name, flags, reason):
    caplog.set_level("INFO", "hrm_megatron")
    if name == "one":
        tokenizer = TextTokenizer(GOLDEN / "tokenizer")
        with IndexedExamplesWriter(tmp_path / "one", tokenizer) as writer:
            writer.add(*example(tokenizer, 0))
        caplog.clear()  # of what the tokenizer says of itself
    data = ["--train-data-path", store] if name == "alone" else ["--data-path", tmp_path / "one" if flags == [] else
                                                                store]
    args, evaluation = open_run(*data, *flags)
    assert not evaluation.validates and not evaluation.tests and args.eval_iters == 0
    (line,) = caplog.messages
    assert line.startswith(f"validation: off, {reason}")
    caplog.clear()
    open_run(*data, *flags, "--eval-iters", 0)  # nobody asked for one
    assert not caplog.messages
    with pytest.raises(ConfigError, match="--skip-train: nothing to evaluate: "):
        open_run(*data, *flags, "--skip-train")


def test_a_test_part_alone_is_still_tested(store, caplog):
    caplog.set_level("INFO", "hrm_megatron")
    args, evaluation = open_run("--data-path", store, "--split", "90,0,10")
    assert (evaluation.validates, evaluation.tests, args.eval_iters) == (False, True, 10)
    assert "validation: off, --split 90,0,10 leaves none" in caplog.text
