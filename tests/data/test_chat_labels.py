"""Of a chat only what the assistant says is learned: packed rows against definitions that know of no packing."""
from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.preprocess import preprocess

ROW_TOKENS = 160
CHATS = [[("system", "be brief"), ("user", "what is three plus four?"), ("assistant", "seven"),
          ("user", "and plus one?"), ("assistant", "eight is right")],
         [("user", "is that is?"), ("assistant", "that is that")],
         [("assistant", "hello there"), ("user", "two?"), ("tool", "look: 2"), ("assistant", "it is 2"),
          ("assistant", "or so"), ("user", "thanks")]]
# What is said behind a question or a tool: the greeting that comes first is none.
ANSWERS = [[2, 4], [1], [3, 4]]


@pytest.fixture
def rows(write_jsonl, tokenizer, tmp_path):
    """The chats as a run reads them."""
    path = write_jsonl("chats.jsonl", [{"condition": "cot", "messages": [
        {"role": role, "content": text} for role, text in chat]} for chat in CHATS])
    preprocess([path], tmp_path / "store", tokenizer, 1, RowFormat(shape="messages"), ROW_TOKENS)
    found = PackedRows(IndexedExamples(tmp_path / "store"), ROW_TOKENS, 0, 0, fixed=True)
    found.num_rows = found.rows_per_epoch
    assert 1 < len(found) < sum(map(len, ANSWERS))  # some rows have several examples
    return found


def spelled(chat, until):
    """What was said before a turn, as docs/data.md says."""
    before = chat[:until]
    system = [before.pop(0)[1]] if before[0][0] == "system" else []
    said = [before[0][1]] if [role for role, _ in before] == ["user"] else [f"{role.title()}: {text}" for role, text
                                                                           in before]
    return "\n\n".join(system + said)


def dense(tokenizer):
    """For each answer the inputs and the labels, of one whole sequence: position i predicts token i + 1, if the
    assistant says it now or ends there."""
    found = []
    for chat, answers in zip(CHATS, ANSWERS, strict=True):
        for i in answers:
            prefix = tokenizer.encode_prefix("cot", spelled(chat, i))
            said = tokenizer.tokenizer.encode(chat[i][1], add_special_tokens=False).ids
            whole = [*prefix, *said, tokenizer.eoa]
            labels = [whole[k + 1] if k + 1 >= len(prefix) else None for k in range(len(whole) - 1)]
            found.append((tuple(whole[:-1]), tuple(labels), len(prefix)))
    return found


def test_labels_are_the_turns_of_the_assistant_and_nothing_else(rows, tokenizer):
    found, texts = Counter(), Counter()
    for row in rows:
        batch = PackedBatch.from_row(row)
        start = 0
        for prefix, response in batch.lengths[0]:
            part = slice(start, start := start + prefix + response)
            labels = [label if label >= 0 else None for label in batch.labels[0, part].tolist()]
            found[tuple(batch.tokens[0, part].tolist()), tuple(labels), prefix] += 1
            said = [label for label in labels if label is not None]
            assert said[-1] == tokenizer.eoa
            texts[tokenizer.decode(said[:-1])] += 1
        assert (batch.labels[0, start:] < 0).all()
    assert found == Counter(dense(tokenizer))
    assert texts == Counter(chat[i][1] for chat, answers in zip(CHATS, ANSWERS, strict=True) for i in answers)


def test_the_loss_is_that_of_these_turns_alone(rows, tokenizer, single_rank):
    """Each answer in a row of its own, all of its logits, and the cross-entropy of what the assistant says."""
    from hrm_megatron.config import Architecture
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    model = HRMModel(hrm_config(Architecture(1, 24, 3, 40, tokenizer.vocab_size)), seed=3).eval()
    expected = []
    with torch.no_grad():
        packed = sum(float(model(PackedBatch.from_row(row))[0].double().sum()) for row in rows)
        for tokens, labels, prefix in dense(tokenizer):
            answer = [*tokens[prefix:], tokenizer.eoa]
            alone = PackedBatch.from_row(assemble_row([(np.array(tokens[:prefix]), np.array(answer))], len(tokens)))
            logits = model.logits_at(model.states(alone), torch.arange(len(tokens))).double()
            told = torch.tensor([-100 if label is None else label for label in labels])
            expected.append(float(torch.nn.functional.cross_entropy(logits, told, reduction="sum")))
    # fp32 through 8 applications of a layer; sums over some thirty labels in fp64.
    assert packed == pytest.approx(sum(expected), rel=1e-5)
