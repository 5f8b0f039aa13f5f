"""A batch cut for context parallel ranks loses no label and doubles none."""
import numpy as np
import torch

from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.parallel.context import context_positions


def test_the_ranks_of_a_row_share_its_labels():
    rng = np.random.default_rng(4)
    rows = [assemble_row([(rng.integers(1, 99, p), rng.integers(1, 99, r + 1)) for p, r in pairs], 24)
            for pairs in ([(3, 4), (5, 0), (2, 6)], [(7, 9)])]
    whole = PackedBatch.from_rows({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    assert whole.row_tokens == 24 and whole.num_examples == 4
    found = []
    for rank in range(3):
        positions = context_positions(24, rank, 3)
        part = whole.on_context_rank(positions)
        assert part.tokens.shape == (2, 8) and part.lengths == whole.lengths and part.row_tokens == 24
        assert torch.equal(part.tokens, whole.tokens[:, positions])
        assert torch.equal(part.position_ids, whole.position_ids[:, positions])
        places = positions[part.label_index // 2] * 2 + part.label_index % 2  # in the whole [s, b]
        found += zip(places.tolist(), part.flat_labels.tolist(), part.label_example.tolist(), strict=True)
    assert sorted(found) == list(zip(whole.label_index.tolist(), whole.flat_labels.tolist(),
                                     whole.label_example.tolist(), strict=True))


def test_examples_in_another_order_are_what_a_row_of_that_order_is():
    rng = np.random.default_rng(5)
    orders = [[2, 0, 1], [0], []]
    examples = [[(rng.integers(1, 99, p), rng.integers(1, 99, r + 1)) for p, r in pairs]
                for pairs in ([(3, 4), (5, 0), (2, 6)], [(7, 9)], [])]
    laid = [examples, [[row[i] for i in order] for row, order in zip(examples, orders, strict=True)]]
    given, wanted = (PackedBatch.from_rows({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
                     for rows in ([assemble_row(row, 24) for row in all_rows] for all_rows in laid))
    found = given.in_order(orders)
    assert found.lengths == wanted.lengths and found.num_examples == wanted.num_examples
    for name in ("tokens", "labels", "position_ids", "label_index"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    numbers = torch.tensor([2, 0, 1, 3])  # an example keeps its own
    assert torch.equal(found.label_example, numbers[wanted.label_example])
