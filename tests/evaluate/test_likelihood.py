"""Log-likelihoods of pairs against transformers' HrmText, and what they must not depend on."""
import numpy as np
import pytest
import torch

from hrm_megatron.config import ConfigError
from tests.model.test_transformers import models

# Logits of two fp32 computations agree to so much: tests/model/test_transformers.py.
LOGITS = 2e-5
VOCAB = 250  # of 256 rows: transformers would count the padded ones in, the decoder has them no more


def within(answer_tokens):
    """Each log-probability moves by at most twice the difference of logits, of its own and of the normalizer."""
    return 2 * LOGITS * answer_tokens


@pytest.fixture(scope="module")
def both(single_rank):
    from hrm_megatron.generate.decode import decoder_of

    ours, theirs = models((2, 24, 3, 40, 2, 3), seed=3)
    return decoder_of(ours, 64, VOCAB), theirs


def random_pairs(count, seed=0):
    from hrm_megatron.evaluate.likelihood import Pair

    rng = np.random.default_rng(seed)
    return [Pair(rng.integers(1, 250, rng.integers(1, 40)).tolist(), rng.integers(1, 250, 1 + i % 2).tolist()
                 if i % 3 else rng.integers(1, 250, rng.integers(1, 20)).tolist()) for i in range(count)]


def by_transformers(model, pair):
    ids = torch.tensor([[*pair.prompt, *pair.answer]])
    prefix = torch.tensor([[1] * len(pair.prompt) + [0] * len(pair.answer)])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=prefix).logits[0, :, :VOCAB]
    logprobs = logits.double().log_softmax(-1)[len(pair.prompt) - 1:-1]
    answer = ids[0, len(pair.prompt):]
    chosen = logprobs[torch.arange(len(answer)), answer]
    return chosen, bool((logprobs.argmax(-1) == answer).all())


def test_a_hundred_pairs_equal_transformers(both):
    from hrm_megatron.evaluate.likelihood import Pair, likelihoods

    decoder, theirs = both
    pairs = random_pairs(99)
    best = by_argmax(theirs, pairs[0].prompt)
    pairs.append(Pair(pairs[0].prompt, [best]))
    scored = []
    found = likelihoods(decoder, pairs, batch_tokens=100, on_scored=scored.append)
    assert sum(scored) == len(found) == len(pairs) and len(scored) > 2
    for pair, have in zip(pairs, found, strict=True):
        chosen, greedy = by_transformers(theirs, pair)
        assert abs(have.logprob - chosen.sum().item()) < min(1e-4, within(len(pair.answer))), pair
        assert have.greedy == greedy
    assert found[-1].greedy and not all(each.greedy for each in found)


def by_argmax(model, prompt):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        return int(model(input_ids=ids, token_type_ids=torch.ones_like(ids)).logits[0, -1, :VOCAB].argmax())


def test_a_window_counts_only_its_own_tokens(both):
    from hrm_megatron.evaluate.likelihood import Pair, likelihoods

    decoder, theirs = both
    [pair] = random_pairs(1)
    pair = Pair(pair.prompt, [*pair.answer, 7, 8, 9], first=2)
    [have] = likelihoods(decoder, [pair])
    chosen, _ = by_transformers(theirs, pair)
    assert abs(have.logprob - chosen[2:].sum().item()) < within(len(pair.answer))


def test_rolling_counts_each_token_once_with_as_much_before_it_as_fits():
    from hrm_megatron.evaluate.likelihood import rolling

    text = list(range(100, 123))
    pairs = rolling([1, 2, 3], text, context_tokens=12)  # windows of 10
    assert [token for pair in pairs for token in pair.answer[pair.first:]] == text
    assert [(len(pair.answer), pair.first) for pair in pairs] == [(10, 0), (10, 0), (10, 7)]
    assert {pair.positions for pair in pairs} == {12}
    assert [len(pair.answer) for pair in rolling([1, 2, 3], text[:4], 12)] == [4]
    with pytest.raises(ConfigError, match="leaves no room"):
        rolling([1] * 13, text, 12)


def test_what_does_not_fit_is_refused(both):
    from hrm_megatron.evaluate.likelihood import Pair, likelihoods

    assert len(likelihoods(both[0], [Pair([1] * 60, [2] * 5)])) == 1
    with pytest.raises(ConfigError, match="prompt of 60 and answer of 6 tokens are longer than the model's context"):
        likelihoods(both[0], [Pair([1] * 60, [2] * 6)])
    with pytest.raises(ConfigError, match="empty prompt or answer"):
        likelihoods(both[0], [Pair([1], [])])
