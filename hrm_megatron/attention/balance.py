"""The order of a row's examples under which context parallel ranks have about as many (query, key) pairs each.

Slices have equal lengths, but a position of a long example has more keys than one of a short example. The order changes
no loss beyond rounding, so that of a row is chosen by counting; keys are gathered and slices cut as ever.
"""
from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from hrm_megatron.parallel.context import context_spans

ALL_ORDERS_OF = 4  # examples; the gain is large where a row has few, and their orders are 24
COUNTED_EXAMPLES, FEWEST_ORDERS = 1024, 8  # in the orders tried: a few milliseconds on a row of 32,768 tokens
EVEN_ENOUGH = 1.01  # of the busiest rank over the mean


def balanced_order(examples: Sequence[tuple[int, int]], row_tokens: int, ranks: int) -> list[int]:
    """Order the (prefix, response) examples of a row so that its busiest rank has the fewest pairs, of orders tried.

    A function of its arguments alone, so that all ranks find the same. The given order is tried first.
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
    """List for each rank the positions of a row that it holds, (first, last + 1) of those that adjoin."""
    return [[(span.start, span.start + span.length) for span in context_spans(row_tokens, rank, ranks)]
            for rank in range(ranks)]


def rank_loads(examples: Sequence[tuple[int, int]], cuts: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    """Count the (query, key) pairs of ranks that hold the positions `cuts[rank]`, in one walk over the row."""
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
    """Count the pairs of the first `queries` positions of an example."""
    assert queries <= prefix + response
    causal = max(0, queries - prefix)
    return queries * prefix + causal * (causal + 1) // 2


def _orders(examples: Sequence[tuple[int, int]], ranks: int) -> Iterator[list[int]]:
    """Yield the given order; then all others of few examples, else lengths dealt out to chunks, then random ones."""
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
