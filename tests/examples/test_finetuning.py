"""The parts of examples/finetuning: its chats, its folder, its promise, and ways that share one exact step."""
from __future__ import annotations

import re

import pytest

from examples.finetuning.chats import questions_of, write_chats
from examples.finetuning.run import MARKER, Failed, judge, prepare
from hrm_megatron.config import ConfigError

COUNTS = {"train": 300, "held_out": 40, "test": 50}


def numbers(chats):
    return {number for chat in chats for turn in chat["messages"] if turn["role"] == "user"
            for number in re.findall(r"\d+", turn["content"])}


def test_no_number_of_training_is_in_another_chat(tmp_path):
    files = write_chats(tmp_path / "a", COUNTS)
    assert {name: len(chats) for name, chats in files.items()} == COUNTS
    assert not numbers(files["train"]) & (numbers(files["held_out"]) | numbers(files["test"]))
    assert write_chats(tmp_path / "b", COUNTS) == files
    assert all((tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
               for name in COUNTS)


def test_every_answer_is_its_number_backwards(tmp_path):
    chats = write_chats(tmp_path, COUNTS)["test"]
    rows = questions_of(chats)
    assert len(rows) == sum(len(chat["messages"]) // 2 for chat in chats) > len(chats)
    assert all(row["response"] == re.findall(r"\d+", row["instruction"])[-1][::-1] for row in rows)


def test_the_promise():
    judge([0.0, 0.7], [0.95, 0.66])
    for after in ([0.89, 0.7], [0.99, 0.64]):
        with pytest.raises(Failed, match="promised are 90%, and a fall of at most 5 points"):
            judge([0.0, 0.7], after)


def test_nothing_of_others_is_replaced(tmp_path):
    demo, folder = tmp_path / "demo", tmp_path / "out"
    with pytest.raises(ConfigError, match="no checkpoints in it; run `make demo`"):
        prepare(demo, folder)
    for name in ("checkpoints", "tokenizer", "questions"):
        (demo / name).mkdir(parents=True)
    for name in ("train", "test"):
        (demo / "questions" / f"{name}.jsonl").touch()
    (folder / "stores").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not of this example"):
        prepare(demo, folder)
    (folder / MARKER).touch()
    (folder / "mine").touch()
    prepare(demo, folder)
    assert {path.name for path in folder.iterdir()} == {MARKER, "mine"}


@pytest.mark.parametrize("rank", [0, 3])
def test_the_factors_of_an_adapter_get_the_gradients_of_their_product(single_rank, rank):
    """LoRA's chain rule against autograd through the product, and a rate by ticks that only divides."""
    import torch

    from examples.finetuning.compare import Adapters, Way, groups
    from tests.model.small import batch, build

    model = build()
    if not rank:
        shares = {name: group["share"] for (name, _), group in zip(
            model.named_parameters(), groups(model, Way("", (), by_ticks=True)), strict=True)}
        # With 5 gradient ticks: 2 of H and 3 of L.
        assert {name.split(".")[0]: share for name, share in shares.items()} == {
            "embedding": 1, "h_stack": 1 / 2, "l_stack": 1 / 3, "output_layer": 1}
        assert {group["share"] for group in groups(model, Way("", ()))} == {1}
        return
    adapters = Adapters(model, rank, seed=0)
    assert len(adapters.factors) == 2 * 2 * 4  # stacks, layers, linear layers of each
    with torch.no_grad():
        for _, _, b, _ in adapters.factors:
            b.normal_(std=0.1)
    adapters.apply()
    model(batch(), bp_steps=5)[0].sum().backward()
    adapters.take_gradients()
    names = {name: weight for name, weight in model.named_parameters()
             if any(weight is adapted for adapted, *_ in adapters.factors)}
    leaves = [(b.detach().clone().requires_grad_(), a.detach().clone().requires_grad_())
              for _, _, b, a in adapters.factors]
    replaced = {name: fixed + b @ a for (name, _), (_, fixed, _, _), (b, a) in zip(
        names.items(), adapters.factors, leaves, strict=True)}
    torch.func.functional_call(model, replaced, (batch(),), {"bp_steps": 5})[0].sum().backward()
    for (_, _, b, a), (b_leaf, a_leaf) in zip(adapters.factors, leaves, strict=True):
        # fp32, the same products in another order
        torch.testing.assert_close(b.grad, b_leaf.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.grad, a_leaf.grad, rtol=1e-4, atol=1e-4)
