"""Answers against HRM-Text's own greedy decoding, and sampled tokens against the probabilities they come from."""
import math

import pytest
import torch

from hrm_megatron.config import ConfigError
from tests.rounding import ORDERS, REFERENCE_STATES

LOGIT_TOLERANCE = 2 * ORDERS * REFERENCE_STATES  # between two fp32 computations
NEVER = -1  # no token stops the reference's answers
EOA = 11


@pytest.fixture(scope="module")
def golden(golden_case):
    case = golden_case("generate")
    cases = case.facts["prompts"]
    assert len({len(each["prompt"]) for each in cases}) == len(cases) == 3
    return [each["prompt"] for each in cases], [each["greedy_tokens"] for each in cases], case.tensors


@pytest.mark.parametrize("row_tokens", [4096, 40, 1], ids=["one row", "two rows", "a row each"])
def test_greedy_answers_equal_the_reference(model, golden, row_tokens):
    from hrm_megatron.generate.decode import generate

    prompts, answers, _ = golden
    assert generate(model, prompts, NEVER, 256, 10, row_tokens=row_tokens) == answers


def test_a_row_holds_what_fits(model, golden, monkeypatch):
    from hrm_megatron.generate import decode

    rows = []
    stock = decode.next_token_logits

    def next_token_logits(model, prompts, answers):
        rows.append([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)])
        return stock(model, prompts, answers)
    monkeypatch.setattr(decode, "next_token_logits", next_token_logits)
    decode.generate(model, golden[0], NEVER, 256, 3, row_tokens=14)
    assert rows == [[4, 9], [15], [5], [10], [16], [6], [11], [17]]  # 15 and more: alone in a row that is too long


def test_logits_equal_the_reference_packed_and_alone(model, golden):
    from hrm_megatron.generate.decode import next_token_logits

    prompts, answers, tensors = golden
    for count in range(10):
        so_far = [answer[:count] for answer in answers]
        packed = next_token_logits(model, prompts, so_far)
        for i, (prompt, answer) in enumerate(zip(prompts, so_far, strict=True)):
            want = tensors[f"p{i}.logits"][count]
            assert (packed[i] - want).abs().max() < LOGIT_TOLERANCE, (i, count)
            assert (next_token_logits(model, [prompt], [answer])[0] - want).abs().max() < LOGIT_TOLERANCE, (i, count)


def test_raw_weights_answer_otherwise(converted, golden):
    from hrm_megatron.generate.decode import next_token_logits
    from hrm_megatron.generate.load import load_model, open_checkpoint

    prompts, _, tensors = golden
    logits = next_token_logits(load_model(open_checkpoint(converted, 10), "raw"), prompts[:1], [[]])
    assert (logits[0] - tensors["p0.logits"][0]).abs().max() > 100 * LOGIT_TOLERANCE


def test_the_prompt_is_read_both_ways(model, golden):
    # As a response it would be causal: the same tokens, other logits.
    from hrm_megatron.generate.decode import next_token_logits

    prompts, _, tensors = golden
    causal = next_token_logits(model, [prompts[1][:1]], [prompts[1][1:]])
    assert (causal[0] - tensors["p1.logits"][0]).abs().max() > 100 * LOGIT_TOLERANCE


@pytest.mark.parametrize(("max_new_tokens", "counts"), [(10, [0] * 5 + [2, 0, 1, 0]), (7, [0] * 5 + [2, 0, 1])])
def test_an_answer_ends_with_the_stop_token(model, golden, max_new_tokens, counts):
    from hrm_megatron.generate.decode import generate

    prompts, answers, _ = golden
    ends = [answer.index(EOA) + 1 for answer in answers]
    assert ends == [8, 6, 6]
    ended = []
    have = generate(model, prompts, EOA, 256, max_new_tokens, on_answer=ended.append)
    assert have == [answer[:min(end, max_new_tokens)] for answer, end in zip(answers, ends, strict=True)]
    assert ended == counts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_vocabulary_is_never_chosen(model, golden, temperature):
    from hrm_megatron.generate.decode import Sampling, generate

    prompts, sampling = golden[0], Sampling(temperature)
    before = generate(model, prompts, NEVER, 250, 6, sampling)
    with torch.no_grad():  # of two opposite rows one has the largest logit
        weight = model.output_layer.weight
        weight[250:] = weight[33:34] * torch.tensor([[50.0], [-50.0]] * 3)
    padded = generate(model, prompts, NEVER, 256, 6, sampling)
    assert all(token >= 250 for token in padded[0][:1])
    assert generate(model, prompts, NEVER, 250, 6, sampling) == before


def test_a_narrow_nucleus_is_greedy(model, golden):
    from hrm_megatron.generate.decode import Sampling, generate

    prompts, answers, _ = golden
    assert generate(model, prompts, NEVER, 256, 10, Sampling(temperature=3.0, top_p=1e-6)) == answers
    assert generate(model, prompts, NEVER, 256, 10, Sampling(temperature=1e-4)) == answers


def test_a_seed_decides_the_answers(model, golden):
    from hrm_megatron.generate.decode import Sampling, generate

    one, again, other = (generate(model, golden[0], NEVER, 256, 8, Sampling(2.0, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert one != golden[1]


LOGITS = torch.tensor([[0.3, 2.0, -1.0, 1.5, 0.0], [1.0, 0.2, 0.9, -3.0, 2.5]])
DRAWS = 20_000


def frequencies(sampling):
    """Share of each token over many draws from both rows of LOGITS, [2, v]."""
    from hrm_megatron.generate.decode import choose

    tokens = choose(LOGITS.repeat(DRAWS, 1), sampling, torch.Generator().manual_seed(5)).view(DRAWS, 2)
    return torch.stack([tokens[:, row].bincount(minlength=5) / DRAWS for row in (0, 1)])


def assert_drawn_from(have, probabilities):
    for share, p in zip(have.flatten().tolist(), [p for row in probabilities for p in row], strict=True):
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / DRAWS), (share, p)  # five standard deviations; exact for 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_tokens_are_drawn_with_their_probabilities(single_rank, temperature):
    from hrm_megatron.generate.decode import Sampling

    weights = [[math.exp(x / temperature) for x in row] for row in LOGITS.tolist()]
    assert_drawn_from(frequencies(Sampling(temperature)), [[w / sum(row) for w in row] for row in weights])


@pytest.mark.parametrize(("top_p", "kept"), [(0.7, [{1, 3}, {4, 0}]), (0.95, [{1, 3, 0, 4}, {4, 0, 2, 1}]),
                                             (0.5, [{1}, {4}])])
def test_the_nucleus_is_the_fewest_tokens_of_that_mass(single_rank, top_p, kept):
    from hrm_megatron.generate.decode import Sampling

    probabilities = []
    for row, tokens in zip(LOGITS.tolist(), kept, strict=True):
        weights = [math.exp(x) for x in row]
        mass = sum(weights[token] for token in tokens)
        assert mass - min(weights[token] for token in tokens) < top_p * sum(weights) <= mass  # the definition
        probabilities.append([weight / mass if token in tokens else 0.0 for token, weight in enumerate(weights)])
    assert_drawn_from(frequencies(Sampling(1.0, top_p)), probabilities)


@pytest.mark.parametrize(("values", "message"), [
    (dict(temperature=-0.1), r"temperature=-0\.1: must be 0 \(greedy\) or positive"),
    (dict(temperature=math.nan), r"temperature=nan: must be"),
    (dict(temperature=1.0, top_p=0.0), r"top_p=0\.0: must be above 0 and at most 1"),
    (dict(temperature=1.0, top_p=1.01), r"top_p=1\.01: must be above"),
    (dict(temperature=1.0, top_p=math.nan), r"top_p=nan: must be above"),
])
def test_bad_sampling_is_refused(single_rank, values, message):
    from hrm_megatron.generate.decode import Sampling

    with pytest.raises(ConfigError, match=message):
        Sampling(**values)
