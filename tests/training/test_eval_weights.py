"""--eval-weights: results of the EMA are those of a checkpoint converted to it, and training does not notice."""
import argparse

import pytest
import torch

from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.data.indexed_examples import IndexedExamples, IndexedExamplesWriter
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.training.data import plan_evaluations
from hrm_megatron.training.evaluation import Evaluation
from tests.training.conftest import GOLDEN, scalars

SPLIT, STEPS = "55,30,15", 6
NAMES = ("lm loss", "accuracy", "exact accuracy")
LAYOUTS = {
    "DP 2, overlap, bf16": (2, ["--overlap-grad-reduce", "--overlap-param-gather", "--bf16"], ["--bf16"]),
    "TP 2 x PP 2": (4, ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2], []),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    tokenizer = TextTokenizer(GOLDEN / "tokenizer")
    prefix = tmp_path_factory.mktemp("store") / "store"
    with IndexedExamplesWriter(prefix, tokenizer) as writer:
        for i in range(60):
            writer.add(tokenizer.encode_prefix("direct", "x" * (i % 7) + str(i)),
                       tokenizer.encode_response("a" if i % 4 else "bc"))
    return prefix


@pytest.fixture(scope="module")
def train(launch, store):
    """Train six steps with two evaluations on the way and one at the end, and save the last step."""
    def train(folder, *flags, ranks=1):
        run = launch("--data-path", store, "--split", SPLIT, "--num-layers", 2, "--hidden-size", 32,
                     "--num-attention-heads", 2, "--seq-length", 24, "--global-batch-size", 4, "--micro-batch-size", 2,
                     "--train-iters", STEPS, "--lr", 2e-2, "--ema-decay", 0.5, "--eval-interval", 2,
                     "--log-interval", 1, "--save", folder / "checkpoints", "--tensorboard-dir", folder / "log",
                     *flags, ranks=ranks)
        assert run.code == 0, run.output[-5000:]
        return run
    return train


def assert_same_checkpoint(one, other):
    a, b = (DCPFolder(find_iteration(folder / "checkpoints")) for folder in (one, other))
    assert a.shapes() == b.shapes()
    assert not [key for key in a.shapes() if not torch.equal(a.tensor(key), b.tensor(key))]


@pytest.mark.parametrize("layout", [
    "DP 2, overlap, bf16", pytest.param("TP 2 x PP 2", marks=[pytest.mark.slow, pytest.mark.ranks])])
def test_the_ema_is_evaluated_and_training_is_bitwise_the_same(train, launch, store, tmp_path, layout):
    ranks, flags, precision = LAYOUTS[layout]
    raw, both = tmp_path / "raw", tmp_path / "both"
    train(raw, "--full-validation", *flags, ranks=ranks)
    train(both, "--full-validation", "--eval-weights", "both", *flags, ranks=ranks)
    assert_same_checkpoint(raw, both)
    for name in ("lm loss", *(f"{name} {part}" for name in NAMES for part in ("validation", "test"))):
        assert scalars(raw / "log", name) == scalars(both / "log", name)

    convert(Conversion(both / "checkpoints", "megatron", tmp_path / "ema", "megatron", weights="ema"))
    run = launch("--data-path", store, "--split", SPLIT, "--full-validation", "--micro-batch-size", 2,
                 "--skip-train", "--use-checkpoint-args", "--load", tmp_path / "ema", "--save", tmp_path / "alone",
                 *precision, prelude=WRITE_EVALUATIONS.format(str(tmp_path / "alone.log")))
    assert run.code == 0, run.output[-5000:]
    lines = (tmp_path / "alone.log").read_text().splitlines()
    alone = [dict(zip(NAMES, map(float, line.split()), strict=True)) for line in lines]
    for part, expected in zip(("validation", "test"), alone, strict=True):
        for name, value in expected.items():
            found = scalars(both / "log", f"{name} {part} EMA")[STEPS]
            # fp32 sums over about a hundred labels; bf16 products, rounded to 2^-9, in another order under TP and DP
            assert found == pytest.approx(value, abs=5e-3 if precision else 2e-6), (part, name)
        assert scalars(both / "log", f"lm loss {part} EMA")[STEPS] != scalars(raw / "log", f"lm loss {part}")[STEPS]


# The console rounds, and an evaluation alone writes no TensorBoard log.
WRITE_EVALUATIONS = """
from megatron.training import training
stock = training.evaluate
def evaluate(*arguments, **options):
    found = stock(*arguments, **options)
    with open({0!r}, "a") as file:
        print(*(found[0][name].item() for name in ("lm loss", "accuracy", "exact accuracy")), file=file)
    return found
training.evaluate = evaluate
"""


def test_both_read_the_same_rows_and_a_resumed_run_is_bitwise_the_whole_one(train, tmp_path):
    flags = ["--eval-iters", 1, "--eval-global-batch-size", 2, "--eval-weights"]  # half of the rows
    whole, parts, raw, ema = (tmp_path / name for name in ("whole", "parts", "raw", "ema"))
    run = train(whole, *flags, "both")
    for weights in ("", " EMA"):
        assert run.last_output.count(f"  validation{weights}: loss ") == 3  # at 2, 4 and 6, which is the end
    train(parts, *flags, "both", "--save-interval", 3, "--exit-interval", 3)
    train(parts, *flags, "both", "--load", parts / "checkpoints")
    assert_same_checkpoint(whole, parts)
    train(raw, *flags, "raw")
    train(ema, *flags, "ema")
    for name in NAMES:
        found = scalars(whole / "log", f"{name} validation EMA")
        assert found.keys() == {2, 4, 6}
        assert found == scalars(parts / "log", f"{name} validation EMA") == scalars(ema / "log",
                                                                                    f"{name} validation EMA")
        assert scalars(whole / "log", f"{name} validation") == scalars(raw / "log", f"{name} validation")
    with pytest.raises(KeyError):
        scalars(ema / "log", "lm loss validation")
    changed = tmp_path / "changed"
    for weights, end in (("raw", 3), ("both", 5), ("raw", STEPS + 1)):
        train(changed, *flags, weights, "--exit-interval", end, "--load", changed / "checkpoints")
    for name in NAMES:
        assert scalars(changed / "log", f"{name} validation") == scalars(raw / "log", f"{name} validation")
        of_ema = scalars(whole / "log", f"{name} validation EMA")
        assert scalars(changed / "log", f"{name} validation EMA") == {4: of_ema[4]}


def test_rows_are_read_again_window_by_window(store):
    def rows(first):
        dataset = PackedRows(IndexedExamples(store), 24, 3, 24 + first, fixed=True)
        plain = [dataset[i]["tokens"].tolist() for i in range(24)]
        dataset.read_again(passes=2, window=3, first=first)
        return plain, [dataset[i]["tokens"].tolist() for i in range(first, 24)]

    plain, read = rows(0)
    order = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert read[:12] == [plain[i] for i in order]
    assert rows(3)[1][:6] == [plain[i] for i in order[6:]]  # where a run goes on
    assert rows(4)[1][:12] == [plain[i + 4] for i in order]  # with other numbers before


@pytest.mark.parametrize("theirs, passes", [
    ({}, 1), (dict(eval_weights="raw"), 1), (dict(eval_weights="both"), 2),
    (dict(eval_weights="both", counts_passes=False), 1)])
def test_older_checkpoints_count_rows_once_for_each_pass(store, theirs, passes):
    evaluation = Evaluation(validates=True, tests=False, whole=False, test_iters=1, weights="both")
    evaluation.go_on(argparse.Namespace(**theirs))
    args = argparse.Namespace(consumed_valid_samples=8, eval_iters=1, eval_global_batch_size=4, eval_interval=2,
                              train_iters=6, skip_train=False)
    valid = PackedRows(IndexedExamples(store), 24, 3, 1, fixed=True)
    plan_evaluations(args, evaluation, valid, None)
    assert args.consumed_valid_samples == 8 // passes and len(valid) == 8 // passes + 4 * 4 * 2
    first, again = ([valid[8 // passes + i + j]["tokens"].tolist() for j in range(4)] for i in (0, 4))
    valid.read_again(1, 4, 0)
    assert first == again == [valid[8 // passes + j]["tokens"].tolist() for j in range(4)]


@pytest.mark.parametrize("flags, reason", [
    (["--eval-iters", 0], "--eval-weights ema: has no effect, nothing is evaluated"),
    (["--skip-train"], "--eval-weights ema: --skip-train loads no EMA; convert the checkpoint with `--weights ema`"),
    (["--use-torch-fsdp2"], "--eval-weights ema: not built under FSDP")])
def test_what_cannot_be_evaluated_is_refused(launch, store, tmp_path, flags, reason):
    run = launch("--data-path", store, "--split", SPLIT, "--num-layers", 1, "--hidden-size", 32,
                 "--num-attention-heads", 2, "--seq-length", 24, "--global-batch-size", 4, "--micro-batch-size", 2,
                 "--train-iters", 2, "--lr", 1e-3, "--save", tmp_path / "new", "--eval-weights", "ema", *flags)
    assert run.code == 2 and len(run.errors) == 1 and reason in run.errors[0], run.output
    assert not (tmp_path / "new").exists()
