"""Context parallel ranks have about as many (query, key) pairs each, counted on HRM-Text's own lengths of examples."""
import random

import pytest

from hrm_megatron.parallel.cpu import activate

activate()

from hrm_megatron.attention.balance import balanced_order, rank_cuts, rank_loads  # noqa: E402
from hrm_megatron.attention.prefix_lm import context_loads  # noqa: E402
from hrm_megatron.benchmark.balance import drawn_rows, shares  # noqa: E402
from hrm_megatron.data.sampled import SampledFolder  # noqa: E402

BOUNDS = {2: 1.10, 4: 1.15}  # of the busiest rank over the mean


@pytest.mark.parametrize("row_tokens, rows", [(4096, 32), (32_768, 6)])
@pytest.mark.parametrize("ranks", BOUNDS)
def test_the_busiest_rank_has_little_more_than_the_mean(golden, row_tokens, rows, ranks):
    drawn = drawn_rows(SampledFolder(golden / "sampled"), row_tokens, rows)
    assert len(drawn) == rows and all(0.9 * row_tokens < sum(map(sum, row)) <= row_tokens for row in drawn)
    given, balanced = shares(drawn, row_tokens, ranks)
    assert max(balanced) <= BOUNDS[ranks]  # in every single row
    if row_tokens == 4096:
        assert max(given) > BOUNDS[ranks]  # so the order is what did it


@pytest.mark.parametrize("ranks", BOUNDS)
def test_rows_of_few_examples_get_the_best_of_their_orders(ranks):
    generator = random.Random(3)
    rows = [[(generator.randint(1, 100), generator.randint(0, 100)) for _ in range(count)] for count in (2, 3, 4) * 9]
    given, balanced = shares(rows, 800, ranks)
    assert all(new <= old for new, old in zip(balanced, given, strict=True))
    assert sum(balanced) < sum(given)


@pytest.mark.parametrize("count", [0, 1, 3, 7, 40])
def test_an_order_has_every_example_once_and_is_the_same_each_time(count):
    generator = random.Random(count)
    row = [(generator.randint(1, 30), generator.randint(0, 20)) for _ in range(count)]
    order = balanced_order(row, 2400, 3)
    assert sorted(order) == list(range(count)) and order == balanced_order(row, 2400, 3)
    ordered = [row[i] for i in order]
    assert max(context_loads([ordered], 2400, 3)) <= max(context_loads([row], 2400, 3))


def test_pairs_are_counted_as_the_pieces_are():
    """The order is chosen by sums up to the cuts; attention cuts pieces: both count the same."""
    generator = random.Random(8)
    for ranks in (1, 2, 3, 4):
        for _ in range(20):
            row = [(generator.randint(1, 9), generator.randint(0, 12)) for _ in range(generator.randint(0, 8))]
            assert rank_loads(row, rank_cuts(192, ranks)) == context_loads([row], 192, ranks)
