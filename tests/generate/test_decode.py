"""Answers against HRM-Text's own greedy decoding."""
import pytest
import torch

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


@pytest.mark.parametrize("max_rows", [32, 2, 1])
def test_greedy_answers_equal_the_reference(model, golden, max_rows):
    from hrm_megatron.generate.decode import generate

    prompts, answers, _ = golden
    assert generate(model, prompts, NEVER, 256, 10, max_rows=max_rows) == answers


def test_no_prompts_have_no_answers(model):
    from hrm_megatron.generate.decode import generate

    assert generate(model, [], NEVER, 256, 10) == []


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


@pytest.mark.parametrize("max_new_tokens", [10, 7])
def test_an_answer_ends_with_the_stop_token(model, golden, max_new_tokens):
    from hrm_megatron.generate.decode import generate

    prompts, answers, _ = golden
    ends = [answer.index(EOA) + 1 for answer in answers]
    assert ends == [8, 6, 6]
    ended = []
    have = generate(model, prompts, EOA, 256, max_new_tokens, on_answer=ended.append)
    assert have == [answer[:min(end, max_new_tokens)] for answer, end in zip(answers, ends, strict=True)]
    assert sum(ended) == 3 and len(ended) == sum(map(len, have))


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
