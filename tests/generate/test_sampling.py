"""Choices against their definitions: transformers' filters, exact probabilities, and numbers of one's own."""
import math

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hrm_megatron.config import ConfigError
from hrm_megatron.generate.sampling import Sampling, candidates, choose, random_numbers

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.0, -0.4, 1.1])
DRAWS = 20_000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("filters", [{}, dict(top_p=0.7), dict(top_p=0.5), dict(top_k=3), dict(min_p=0.3),
                                     dict(top_k=5, top_p=0.8), dict(top_p=0.95, min_p=0.2),
                                     dict(top_k=4, top_p=0.9, min_p=0.25), dict(top_k=100)],
                         ids=lambda filters: ", ".join(f"{name} {value}" for name, value in filters.items()))
def test_filters_keep_what_transformers_keeps(temperature, filters):
    warpers = [TemperatureLogitsWarper(temperature)]
    kinds = (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper))
    warpers += [warper(filters[name]) for name, warper in kinds if name in filters]
    scores = LOGITS[None]
    for warper in warpers:
        scores = warper(None, scores)
    probabilities, ids = candidates(LOGITS, Sampling(temperature, **filters))
    have = torch.zeros(len(LOGITS), dtype=torch.float64)
    have[torch.arange(len(LOGITS)) if ids is None else ids] = probabilities / probabilities.sum()
    torch.testing.assert_close(have, scores[0].softmax(-1).double(), rtol=0, atol=1e-6)  # theirs is fp32
    assert temperature > 1 or not filters or filters.get("top_k") == 100 or (have == 0).any()


@pytest.mark.parametrize("filters", [{}, dict(top_k=3), dict(top_p=0.5), dict(min_p=0.5)], ids=str)
def test_the_lowest_temperature_is_greedy(filters):
    assert choose(LOGITS, Sampling(5e-324, **filters), 0.999) == LOGITS.argmax()


def test_a_large_vocabulary_has_the_nucleus_of_a_full_sort():
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 3
    ordered, order = logits.double().softmax(-1).sort(descending=True)
    for top_p in (0.05, 0.6, 0.99, 0.99999):
        kept = int((ordered.cumsum(-1) - ordered < top_p).sum())
        probabilities, ids = candidates(logits, Sampling(1.0, top_p))
        assert torch.equal(ids, order[:kept]) and torch.equal(probabilities, ordered[:kept])


@pytest.mark.parametrize("sampling", [Sampling(1.3), Sampling(1.0, top_p=0.8)], ids=["all", "nucleus"])
def test_tokens_are_drawn_with_their_probabilities(sampling):
    random = random_numbers(5, 0, 0)
    drawn = torch.tensor([choose(LOGITS, sampling, random.random()) for _ in range(DRAWS)]).bincount(minlength=7)
    probabilities, ids = candidates(LOGITS, sampling)
    want = torch.zeros(7, dtype=torch.float64)
    want[torch.arange(7) if ids is None else ids] = probabilities / probabilities.sum()
    for share, p in zip((drawn / DRAWS).tolist(), want.tolist(), strict=True):
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / DRAWS)  # five standard deviations; exact for 0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0 ** -53])
def test_the_ends_of_the_interval_are_tokens(uniform):
    assert choose(LOGITS, Sampling(1.0), uniform) in (0, 6)
    assert choose(LOGITS, Sampling(1.0, top_k=2), uniform) in (1, 3)
    impossible = torch.cat([torch.full((3,), -torch.inf), LOGITS, torch.full((3,), -torch.inf)])
    assert choose(impossible, Sampling(1.0), uniform) in (3, 9)


def test_every_answer_has_numbers_of_its_own():
    firsts = {random_numbers(*key).random() for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1))}
    assert len(firsts) == 5
    assert random_numbers(1, 2, 3).random() == random_numbers(1, 2, 3).random()


@pytest.mark.parametrize(("values", "message"), [
    (dict(temperature=-0.1), r"temperature=-0\.1: must be 0 \(greedy\) or positive"),
    (dict(temperature=math.nan), r"temperature=nan: must be"),
    (dict(temperature=math.inf), r"temperature=inf: must be"),
    (dict(temperature=1.0, top_p=0.0), r"top_p=0\.0: must be above 0 and at most 1"),
    (dict(temperature=1.0, top_p=1.01), r"top_p=1\.01: must be above"),
    (dict(temperature=1.0, top_p=math.nan), r"top_p=nan: must be above"),
    (dict(temperature=1.0, top_k=-1), r"top_k=-1: must be 0 \(all tokens\) or positive"),
    (dict(temperature=1.0, min_p=1.5), r"min_p=1\.5: must be between 0 and 1"),
    (dict(seed=-3), r"seed=-3: must not be negative"),
    (dict(top_p=0.9), r"without effect at temperature=0 \(greedy\)"),
])
def test_bad_sampling_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)
