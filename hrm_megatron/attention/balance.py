"""Order the examples of a row so that context parallel ranks get about equal numbers of (query, key) pairs.

Slices have equal lengths, but a position in a long example has more keys than one in a short example. The order changes
the loss by rounding only, so it is chosen freely, by counting pairs; slicing and the gather of keys stay as they are.
"""
from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from hrm_megatron.parallel.context import context_spans

ALL_ORDERS_OF = 4  # examples: 24 orders; the gain is large where a row has few examples
COUNTED_EXAMPLES, FEWEST_ORDERS = 1024, 8  # per search: a few milliseconds on a row of 32,768 tokens
EVEN_ENOUGH = 1.01  # ratio of the busiest rank to the mean at which the search stops


def balanced_order(examples: Sequence[tuple[int, int]], row_tokens: int, ranks: int) -> list[int]:
    """Return the order of a row's (prefix, response) examples, of those tried, whose busiest rank has the fewest pairs.

    Deterministic, so that all ranks find the same order. The given order is tried first.
    """
    cuts = rank_cuts(row_tokens, ranks)
    enough = EVEN_ENOUGH * sum(_pairs(p, r, p + r) for p, r in examples) / ranks
    best, fewest = list(range(len(examples))), float("inf")
    for order in _orders(examples, ranks):
        busiest = max(rank_loads([examples[i] for i in order], cuts))
        if busiest < fewest:
            best, fewest = order, busiest
        if fewest <= enough:
            break
    return best


def rank_cuts(row_tokens: int, ranks: int) -> list[list[tuple[int, int]]]:
    """Return for each rank the positions of a row that it holds, as (first, last + 1) of each contiguous span."""
    return [[(span.start, span.start + span.length) for span in context_spans(row_tokens, rank, ranks)]
            for rank in range(ranks)]


def rank_loads(examples: Sequence[tuple[int, int]], cuts: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    """Return the number of (query, key) pairs of each rank, which holds the positions `cuts[rank]`; one pass over the
    row."""
    bounds = sorted({bound for spans in cuts for span in spans for bound in span})
    before, ahead, start, total = dict[int, int](), 0, 0, 0
    for p, r in examples:
        end = start + p + r
        while ahead < len(bounds) and bounds[ahead] <= end:
            before[bounds[ahead]] = total + _pairs(p, r, bounds[ahead] - start)
            ahead += 1
        total, start = total + _pairs(p, r, p + r), end
    before |= dict.fromkeys(bounds[ahead:], total)
    return [sum(before[last] - before[first] for first, last in spans) for spans in cuts]


def _pairs(prefix: int, response: int, queries: int) -> int:
    """Return the number of pairs of the first `queries` positions of an example."""
    assert queries <= prefix + response
    causal = max(0, queries - prefix)
    return queries * prefix + causal * (causal + 1) // 2


def _orders(examples: Sequence[tuple[int, int]], ranks: int) -> Iterator[list[int]]:
    """Yield the given order first. Then, for few examples, all other orders; else lengths dealt round-robin to chunks,
    then random orders."""
    count = len(examples)
    if count <= ALL_ORDERS_OF:
        yield from map(list, itertools.permutations(range(count)))
        return
    yield list(range(count))
    by_length = sorted(range(count), key=lambda i: sum(examples[i]))
    yield [i for chunk in range(2 * ranks) for i in by_length[chunk::2 * ranks]]
    generator = random.Random(0)
    for _ in range(max(FEWEST_ORDERS, COUNTED_EXAMPLES // count)):
        yield generator.sample(range(count), count)
