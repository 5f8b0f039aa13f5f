"""Continuous batching: who is answered when, in which blocks, and that neighbours change nothing."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from hrm_megatron.config import ConfigError
from hrm_megatron.generate.sampling import Sampling

SIZES = (1, 24, 3, 40, 250)
CONTEXT = 64
CLOSE = 2e-5  # logits of one answer in batches of different sizes: fp32, see tests/model/test_transformers.py


@pytest.fixture(scope="module")
def decoder(untrained):
    from hrm_megatron.generate.decode import decoder_of

    return decoder_of(untrained(*SIZES), CONTEXT)


@pytest.fixture
def engine(decoder):
    """Make an engine with so many rows and blocks; `calls` are the sizes of its steps."""
    from hrm_megatron.generate.cache import PagedCache
    from hrm_megatron.generate.engine import Engine

    def make(max_rows, blocks=60, **options):
        return Engine(decoder, PagedCache(decoder.cache_size(blocks)), max_rows, **options)
    return make


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 250, length).tolist() for length in lengths]


def request(prompt, max_new_tokens=6, **options):
    from hrm_megatron.generate.engine import Request

    return Request(prompt, max_new_tokens, **options)


def tokens(answers):
    return [[sample.tokens for sample in samples] for samples in answers]


def decided_tokens(sample):
    """Tokens before two are level: batches of other sizes round otherwise, and may choose the other one."""
    return next((step for step, found in enumerate(sample.logprobs) if found.top[0][1] - found.top[1][1] < 2 * CLOSE),
                len(sample.logprobs))


def all_free(engine):
    return engine.idle and engine.cache.free == engine.cache.size.blocks and engine._promised == 0


def test_a_finished_answers_place_is_taken_at_once(engine, decoder, monkeypatch):
    running, stock = [], decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda new, *rest: running.append(len(new)) or stock(new, *rest))
    one = engine(2)
    answers = one.answer([request(prompt, n) for prompt, n in zip(prompts(5, 9, 4, 20), (2, 7, 4, 3), strict=True)])
    assert [len(samples[0].tokens) for samples in answers] == [2, 7, 4, 3]
    assert running == [2, 2, 2, 2, 2, 2]  # 16 tokens, 4 of them by prefill: no place was ever empty
    assert all_free(one)


def test_answers_that_end_with_their_first_token_do_not_hold_up_others(engine):
    """Nor do those hold up these: there is always a place for one more."""
    one, [prompt, other] = engine(2), prompts(5, 9)
    long = one.submit(request(prompt, 30))
    begun = [[progress.request for progress in one.step() if one.submit(request(other, 1))] for _ in range(30)]
    assert all(step.count(long) == 1 for step in begun) and sum(map(len, begun)) > 30 + 25


def test_answers_do_not_depend_on_their_neighbours(engine):
    """Sampled and greedy, alone and among others in any order and batch: the same tokens."""
    sampling = Sampling(1.5, top_p=0.95, seed=3)
    asked = [request(prompt, 12, sampling=sampling if stream % 2 else Sampling(), stream=stream, logprobs=2)
             for stream, prompt in enumerate(prompts(5, 16, 33, 1, 40, 17, 8))]
    samples = [engine(1).answer([each])[0][0] for each in asked]
    counts = [decided_tokens(sample) for sample in samples]
    assert sum(counts) > 6 * len(asked)

    def decided(answers):
        return [answer[:count] for [answer], count in zip(tokens(answers), counts, strict=True)]
    alone = decided([[sample] for sample in samples])
    assert len({tuple(answer) for answer in alone}) == len(asked)
    assert decided(engine(7).answer(asked)) == alone
    assert decided(engine(3).answer(asked[::-1])[::-1]) == alone
    assert decided(engine(4, prefill_tokens=20).answer(asked)) == alone


def test_logits_agree_to_rounding_among_any_neighbours(engine):
    asked = [request(prompt, 8, logprobs=3, stream=stream) for stream, prompt in enumerate(prompts(5, 16, 33, 1, 40))]
    compared = 0
    for each, [sample] in zip(asked, engine(5).answer(asked), strict=True):
        [[alone]] = engine(1).answer([each])
        count = decided_tokens(alone)
        compared += count
        for have, want in zip(sample.logprobs[:count], alone.logprobs[:count], strict=True):
            assert have.token == want.token and abs(have.logprob - want.logprob) < CLOSE
            assert [token for token, _ in have.top] == [token for token, _ in want.top]
    assert compared > 20


def test_given_tokens_are_scored_as_an_answer_and_gone_on_from(engine):
    """Given an answer's beginning, the rest is the answer's and the logprobs are those that it had; none is chosen."""
    [prompt] = prompts(18)
    [[whole]] = engine(1).answer([request(prompt, 20, logprobs=2)])
    for given, more in ((7, 13), (20, 0)):
        one = engine(1)
        [[again]] = one.answer([request(prompt, more, logprobs=2, given=whole.tokens[:given])])
        assert again.tokens == whole.tokens and again.finish == "length" and all_free(one)
        for have, want in zip(again.logprobs, whole.logprobs, strict=True):
            assert have.token == want.token and abs(have.logprob - want.logprob) < CLOSE
    stop = whole.tokens[3]
    [[past]] = engine(1).answer([request(prompt, 2, given=whole.tokens[:6], stop_tokens=frozenset({stop}))])
    assert past.tokens[:6] == whole.tokens[:6] and len(past.tokens) > 6  # what is given ends nothing
    [[sampled]] = engine(1).answer([request(prompt, 5, sampling=Sampling(2.0, seed=4), given=[3, 5])])
    assert sampled.tokens[:2] == [3, 5] and len(sampled.tokens) == 7


def test_logprobs_are_the_models_own(engine, untrained):
    from hrm_megatron.generate.decode import next_token_logits

    model, [prompt] = untrained(*SIZES), prompts(11)
    [[sample]] = engine(1).answer([request(prompt, 5, sampling=Sampling(2.0, top_k=9), logprobs=4)])
    for step, found in enumerate(sample.logprobs):
        want = next_token_logits(model, [prompt], [sample.tokens[:step]])[0, :250].double().log_softmax(-1)
        values, ids = want.topk(4)
        assert found.token == sample.tokens[step] and abs(found.logprob - want[found.token]) < CLOSE
        assert [token for token, _ in found.top] == ids.tolist()
        assert np.allclose([value for _, value in found.top], values, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("prompt_tokens", [5, 16, 37])
def test_samples_share_one_prefill_and_answer_as_single_ones_do(engine, decoder, monkeypatch, prompt_tokens):
    read, stock = [], decoder.prefill
    monkeypatch.setattr(decoder, "prefill", lambda new, *rest: read.extend(map(len, new)) or stock(new, *rest))
    [prompt] = prompts(prompt_tokens)
    asked = request(prompt, 20, sampling=Sampling(1.5, seed=8), samples=5)
    one = engine(2)
    [together] = tokens(one.answer([asked]))
    assert read == [prompt_tokens] and all_free(one)
    assert len({tuple(sample) for sample in together}) == 5
    assert tokens(engine(5).answer([asked])) == [together]  # other places, the same numbers
    assert tokens(engine(1).answer([replace(asked, samples=1)])) == [together[:1]]


def test_samples_share_the_full_blocks_of_their_prompt(engine):
    one = engine(3)
    one.submit(request(prompts(37)[0], 4, samples=3))
    one.step()
    assert one.cache.size.blocks - one.cache.free == 2 + 3  # two full ones, and a copy of the last for each


def test_a_seed_decides_the_answer(engine):
    [prompt] = prompts(9)
    one, again, other = (tokens(engine(1).answer([request(prompt, 12, sampling=Sampling(2.0, seed=seed))]))
                         for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("blocks", [4, 5, 9])
def test_a_small_cache_answers_everything_later(engine, blocks):
    asked = [request(prompt, 16, samples=samples, sampling=Sampling(1.5), stream=samples)
             for prompt, samples in zip(prompts(32, 7, 33, 16, 1), (1, 3, 2, 4, 1), strict=True)]
    small = engine(8, blocks)
    assert tokens(small.answer(asked)) == tokens(engine(8, 99).answer(asked))
    assert all_free(small)


def test_an_answer_ends_with_the_context(engine):
    [[sample]] = engine(1).answer([request(prompts(60)[0], 50)])
    assert len(sample.tokens) == CONTEXT - 60 and sample.finish == "length"


def test_a_stop_string_ends_an_answer_and_frees_its_place(engine):
    spelled = engine(2, decode_text=lambda ids: "".join(f"<{i}>" for i in ids))
    [prompt] = prompts(9)
    [[whole]] = engine(1).answer([request(prompt, 12)])
    stop = f"<{whole.tokens[4]}>"
    assert whole.tokens[4] not in whole.tokens[:4]
    [[sample]] = spelled.answer([request(prompt, 12, stop=(stop,))])
    assert (sample.tokens, sample.finish) == (whole.tokens[:5], "stop") and all_free(spelled)
    assert sample.text == "".join(f"<{i}>" for i in whole.tokens[:4])


def test_a_cancelled_request_frees_its_place(engine):
    one = engine(2)
    numbers = [one.submit(request(prompt, 30, samples=3)) for prompt in prompts(20, 7)]
    one.step()
    kept = {progress.request for progress in one.step()}
    assert kept == {numbers[0]}
    one.cancel(numbers[0])
    found = {}
    while not one.idle:
        for progress in one.step():
            assert progress.request == numbers[1]
            found[progress.sample] = progress.transcript
    assert len(found) == 3 and all_free(one)


@pytest.mark.parametrize(("values", "message"), [
    (dict(prompt=[]), "empty prompt"),
    (dict(prompt=[3] * 64), "prompt of 64 tokens leaves no room for an answer in the model's context of 64"),
    (dict(prompt=[3] * 40, max_new_tokens=20), "need 5 blocks of the key-value cache, which has 3"),
    (dict(prompt=[3], max_new_tokens=0), "max_new_tokens=0, samples=1: must be at least 1"),
    (dict(prompt=[3] * 30, given=[3] * 34), "prompt of 64 tokens leaves no room"),
    (dict(prompt=[3] * 30, given=[3] * 35, max_new_tokens=0), "prompt of 65 tokens leaves no room"),
    (dict(prompt=[3], samples=0), "samples=0: must be at least 1"),
    (dict(prompt=[3], stop=("x",)), "stop strings need a tokenizer"),
])
def test_what_can_never_be_answered_is_refused(engine, values, message):
    one = engine(1, 3)
    with pytest.raises(ConfigError, match=message):
        one.submit(request(**values))
    assert one.idle


def test_weights_that_give_no_numbers_are_named(untrained):
    from hrm_megatron.generate.decode import generate

    model = untrained(*SIZES)
    with torch.no_grad():
        model.output_layer.weight[3] = torch.nan
    with pytest.raises(ConfigError, match="logits of the model are not finite"):
        generate(model, prompts(4), -1, 250, 3)


@pytest.mark.parametrize("blocks_of_torch", [False, True])
def test_a_prompt_without_finite_logits_fails_alone(untrained, engine, blocks_of_torch):
    """In prefill or later, with samples; its neighbours and those who get its blocks next answer as ever."""
    from hrm_megatron.generate.cache import PagedCache
    from hrm_megatron.generate.decode import decoder_of
    from hrm_megatron.generate.engine import Engine

    damaged = decoder_of(untrained(*SIZES), CONTEXT)
    damaged.weights.embedding[0] = torch.nan  # a token that no other prompt has
    damaged.loops = None if blocks_of_torch else damaged.loops
    good = [request(prompt, 9) for prompt in prompts(21, 40, 7)]
    alone = tokens(engine(1).answer(good))
    one = Engine(damaged, PagedCache(damaged.cache_size(30)), 9)
    one.submit(request([3] * 20 + [0], 9, samples=2, sampling=Sampling(2.0)))
    found = {(progress.request, progress.sample): progress.transcript for progress in one.step()}
    one.submit(request([3] * 5, 9, given=[4, 4, 0, 4]))
    one.step()
    assert one.running[0].blocks == [0]  # by which tables are filled up
    numbers = [one.submit(each) for each in good]
    while not one.idle:
        found |= {(progress.request, progress.sample): progress.transcript for progress in one.step()}
    assert [found[key].finish for key in ((0, 0), (0, 1), (1, 0))] == ["failed"] * 3
    assert len(found[1, 0].tokens) == 3 and [[found[number, 0].tokens] for number in numbers] == alone
    assert all_free(one) and one.cache.pool.isfinite().all() and tokens(one.answer(good)) == alone


def test_a_cache_is_measured_before_it_is_taken(decoder, monkeypatch):
    import psutil

    from hrm_megatron.generate.cache import RESERVE_BYTES, PagedCache

    size = decoder.cache_size(300)
    assert size.bytes == PagedCache(size).pool.nbytes == 8 * 2 * 300 * 16 * 24 * 4  # ticks, K and V, positions, h, fp32
    free = size.bytes + RESERVE_BYTES
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    assert size.check(decoder.device) == (
        f"key-value cache: 7.4 MB for 4800 positions in 8 ticks x layers, {free / 1e6:,.1f} MB are free")
    free -= 1
    with pytest.raises(ConfigError, match="key-value cache: needs 7.4 MB .* are free, of which 268.4 MB are "
                                          "left for all else; lower --batch-size"):
        size.check(decoder.device)
