"""Training over a store with a held-out part: what is logged is what an independent model computes."""
import pytest
import torch

from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.data.dataset import PackedRows, split_store
from hrm_megatron.data.store import ExampleStore, StoreWriter
from hrm_megatron.data.tokenizer import TextTokenizer
from tests.training.conftest import GOLDEN, scalars

COUNT, SEED, SPLIT = 60, 7, "85,15,0"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Sixty different questions; the answer is mostly the same, so that a few steps get some of them exactly right."""
    tokenizer = TextTokenizer(GOLDEN / "tokenizer")
    prefix = tmp_path_factory.mktemp("store") / "store"
    with StoreWriter(prefix, tokenizer) as writer:
        for i in range(COUNT):
            writer.add(tokenizer.encode_prefix("direct", "x" * (i % 7) + str(i)),
                       tokenizer.encode_response("a" if i % 4 else "bc"))
    return prefix


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
    source = ExampleStore(store)
    held_out = split_store(COUNT, SPLIT, SEED).valid
    assert len(held_out) == 9
    rows = PackedRows(source, 64, SEED, 12, example_ids=held_out, fixed=True)
    shown = [int(held_out[i]) for row in range(12) for i in rows.plan.locate(row % rows.rows_per_epoch).example_ids]
    assert set(shown) == set(held_out)  # an evaluation sees all of them, some more than once
    scored = {i: scores_by_transformers(tmp_path / "hf", source[i]) for i in set(shown)}
    losses, labels, right = (sum(scored[i][part] for i in shown) for part in range(3))
    exact = sum(scored[i][1] == scored[i][2] for i in shown)
    assert 0 < exact < len(shown) and right < labels

    # fp32 sums over about a hundred labels.
    expected = {"lm loss": losses / labels, "accuracy": right / labels, "exact accuracy": exact / len(shown)}
    for name, value in expected.items():
        assert scalars(folder / "log", f"{name} validation")[16] == pytest.approx(value, abs=2e-6)


def test_every_metric_reaches_tensorboard_and_console(trained):
    folder, run = trained
    megatrons_lines = (folder / "checkpoints" / "megatron.rank1.log").read_text()
    for name in ("lm loss", "accuracy", "exact accuracy", "tokens per second", "bp steps", "learning-rate"):
        found = scalars(folder / "log", name)
        assert {4, 8, 12, 16} <= found.keys()
        if name != "learning-rate":
            assert f"| {name}: " in megatrons_lines
    assert set(scalars(folder / "log", "bp steps").values()) <= {2.0, 3.0, 4.0, 5.0, 3.75, 3.5}
    assert all(0 < value < 1e7 for value in scalars(folder / "log", "tokens per second").values())
    assert "training: 51 examples" in run.output and "validation: 9 examples" in run.output
