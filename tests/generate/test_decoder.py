"""The decoder's logits against the training code's, which has no cache, and against transformers."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.model.test_transformers import TOLERANCE, models

SIZES = (2, 40, 5, 24, 250)  # layers per stack, hidden, heads, ffn, vocabulary
PROMPTS = (5, 16, 33, 1, 47)  # tokens; blocks of 16 are full, begun and alone
ANSWER_TOKENS = 20  # over the ends of blocks


def random_prompts(lengths=PROMPTS, vocab_size=250, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab_size, length).tolist() for length in lengths]


def filled(decoder, prompts, new_tokens):
    """A cache with room for such answers, and the blocks of each: scattered, as in use."""
    from hrm_megatron.generate.cache import PagedCache, blocks_of

    counts = [blocks_of(len(prompt) + new_tokens) for prompt in prompts]
    cache = PagedCache(decoder.cache_size(sum(counts)))
    order = np.random.default_rng(1).permutation([cache.take() for _ in range(sum(counts))])
    tables = np.zeros((len(prompts), max(counts)), np.int32)
    for row, blocks in enumerate(np.split(order, np.cumsum(counts)[:-1])):
        tables[row, :len(blocks)] = blocks
    return cache, tables


def worst_difference(model, decoder, prompts=None, new_tokens=ANSWER_TOKENS):
    """Largest difference of the logits at every token of the answers that the decoder likes best."""
    from hrm_megatron.generate.decode import next_token_logits

    prompts = prompts or random_prompts()
    cache, tables = filled(decoder, prompts, new_tokens)
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    answers = [[] for _ in prompts]
    logits, worst = decoder.prefill(prompts, list(tables), cache).logits, 0.0
    for _ in range(new_tokens):
        want = next_token_logits(model, prompts, answers)[:, :decoder.vocab_size]
        worst = max(worst, (logits - want).abs().max().item())
        tokens = logits.argmax(-1).tolist()
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token)
        logits = decoder.decode(tokens, lengths, tables, cache)
        lengths = lengths + 1
    return worst


@pytest.mark.parametrize("settings", [{}, dict(norm_placement="post"), dict(h_norm_placement="post"),
                                      dict(h_cycles=1, l_cycles=2), dict(rope_theta=300.0, norm_epsilon=1e-3),
                                      dict(attention_mask="causal")],
                         ids=lambda settings: ", ".join(settings) or "as HRM-Text")
def test_cached_logits_equal_the_training_codes(untrained, parity, settings):
    from hrm_megatron.generate.decode import decoder_of

    model = untrained(*SIZES, **settings)
    parity(f"cached logits, {settings}", worst_difference(model, decoder_of(model, 128)), TOLERANCE)


@pytest.mark.parametrize("mask", ["prefix-lm", "causal"])
def test_likelihoods_see_prompts_as_training_does(untrained, mask):
    from hrm_megatron.evaluate.likelihood import Pair, likelihoods
    from hrm_megatron.generate.decode import decoder_of, next_token_logits

    model = untrained(*SIZES, attention_mask=mask)
    decoder, (prompt, answer) = decoder_of(model, 128), random_prompts((23, 6))
    want = 0.0
    for length, token in enumerate(answer):
        logits = next_token_logits(model, [prompt], [answer[:length]])[0, :decoder.vocab_size]
        want += logits.double().log_softmax(-1)[token].item()
    # A log-probability moves by at most twice the difference of logits, of its own and of the normalizer.
    assert abs(likelihoods(decoder, [Pair(prompt, answer)])[0].logprob - want) < 2 * TOLERANCE * len(answer)


def test_heads_wider_than_a_vector_and_no_multiple_of_it(untrained, parity):
    """Values of a head are weighed 16 elements at once, and the rest of them one by one."""
    from hrm_megatron.generate.decode import decoder_of

    model = untrained(1, 80, 2, 24, 250)  # 40 = 2 * 16 + 8
    parity("cached logits, heads of 40", worst_difference(model, decoder_of(model, 128)), TOLERANCE)


def test_a_row_is_attended_to_the_same_bits_among_any_others():
    from hrm_megatron.generate.attention import Paged
    from hrm_megatron.generate.cache import CacheSize, PagedCache
    from hrm_megatron.generate.cpu import Loops

    lengths, tables = np.asarray([20, 3, 40], np.int32), np.arange(9, dtype=np.int32).reshape(3, 3)
    cache, loops = PagedCache(CacheSize(9, 1, 2, 40, torch.float32)), Loops(64, 40, 1e4)
    generator = torch.Generator().manual_seed(2)
    cache.pool.normal_(generator=generator)
    gqkv = torch.randn(3, 4 * 80, generator=generator)
    together = Paged(cache, lengths, tables, loops)(0, gqkv)
    for row in range(3):
        alone = Paged(cache, lengths[row:row + 1], tables[row:row + 1, :-(-(lengths[row] + 1) // 16)], loops)
        assert torch.equal(alone(0, gqkv[row:row + 1])[0], together[row])


def test_the_gathering_path_of_gpus_equals_the_cpus(untrained, parity):
    from hrm_megatron.generate.decode import decoder_of

    model = untrained(*SIZES)
    decoder = decoder_of(model, 128)
    decoder.loops = None
    parity("cached logits, gathered by torch", worst_difference(model, decoder), TOLERANCE)


@pytest.mark.parametrize(("h_cycles", "l_cycles"), [(1, 3), (2, 1), (4, 5)])
def test_other_cycles_than_in_training_are_those_of_a_model_built_so(untrained, parity, h_cycles, l_cycles):
    from hrm_megatron.generate.decode import decoder_of
    from hrm_megatron.generate.decoder import Decoder

    model = untrained(*SIZES)
    decoder = Decoder(decoder_of(model, 64).weights, 64, h_cycles, l_cycles)
    model.config.architecture = replace(model.config.arch, h_cycles=h_cycles, l_cycles=l_cycles)
    parity(f"cached logits, {h_cycles} x {l_cycles} cycles",
           worst_difference(model, decoder, random_prompts((7, 20)), new_tokens=5), TOLERANCE)
    assert decoder.cache_size(1).slots == 2 * h_cycles * (l_cycles + 1)


def test_threads_divide_the_rows(untrained, monkeypatch):
    from hrm_megatron.generate import attention_kernels
    from hrm_megatron.generate.decode import decoder_of
    from hrm_megatron.layers import on_cpu

    model = untrained(*SIZES)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(on_cpu, "DIVIDED_BYTES", 1)
    given, stock = [], attention_kernels.attend_rows
    monkeypatch.setattr(attention_kernels, "attend_rows",
                        lambda threads, *arrays: given.append(threads) or stock(threads, *arrays))
    assert worst_difference(model, decoder_of(model, 128), new_tokens=3) < TOLERANCE
    assert set(given) == {3}


def test_bfloat16_rounds_no_more_than_the_training_code_does(untrained):
    """Both against fp32: the decoder keeps attention in fp32 and its cache in bf16."""
    from hrm_megatron.generate.decode import decoder_of, next_token_logits
    from hrm_megatron.generate.decoder import Decoder
    from hrm_megatron.generate.weights import take_weights

    model = untrained(*SIZES)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    rounded = Decoder(take_weights(model.config.arch, tensors.items(), dtype=torch.bfloat16), 128)
    exact, prompts, errors = decoder_of(model, 128), random_prompts(), {}
    answers = [prompt[:7] for prompt in random_prompts((9,) * len(prompts), seed=3)]
    found = {}
    for name, decoder in (("bf16", rounded), ("fp32", exact)):
        cache, tables = filled(decoder, prompts, 9)
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        decoder.prefill(prompts, list(tables), cache)
        for step in range(7):
            found[name] = decoder.decode([answer[step] for answer in answers], lengths + step, tables, cache)
    errors["decoder"] = (found["bf16"] - found["fp32"]).abs().max().item()
    theirs = next_token_logits(untrained(*SIZES).bfloat16(), prompts, answers)[:, :250].float()
    errors["training code"] = (theirs - found["fp32"]).abs().max().item()
    # Of two computations that round alike, the largest of a thousand errors differ by a factor of 2 at most.
    assert 0 < errors["decoder"] < 2 * errors["training code"], errors


def test_gathered_and_paged_attention_read_the_same_bfloat16_cache():
    from hrm_megatron.generate.attention import Gathered, Paged
    from hrm_megatron.generate.cache import CacheSize, PagedCache
    from hrm_megatron.generate.cpu import Loops

    lengths, tables = np.asarray([0, 15, 16, 40], np.int32), np.arange(12, dtype=np.int32).reshape(4, 3)
    generator = torch.Generator().manual_seed(2)
    caches = [PagedCache(CacheSize(12, 2, 3, 8, torch.bfloat16)) for _ in range(2)]
    for cache in caches:
        cache.pool.copy_(torch.randn(cache.pool.shape, generator=generator.manual_seed(7)))
    gqkv = torch.randn(4, 4 * 24, generator=generator).bfloat16()
    paged = Paged(caches[0], lengths, tables, Loops(64, 8, 1e4))(1, gqkv)
    gathered = Gathered(caches[1], lengths, tables, 1e4)(1, gqkv)
    # Two roundings to bf16, 2^-9 each, of numbers up to 2; weights of the softmax are rounded in one of them.
    assert (paged.float() - gathered.float()).abs().max() < 4 * 2 * 2 ** -9
    different = (caches[0].pool.float() - caches[1].pool.float()).abs()
    assert (different[0] == 0).all() and different[1].max() <= 4 * 2 ** -8  # one bf16 step of a rotated key below 4
    assert torch.equal(caches[0].pool[1, 1], caches[1].pool[1, 1])  # values bitwise


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4 * 2 ** -8)])
def test_prompts_are_entered_by_loops_as_by_torch(dtype, tolerance, causal):
    from hrm_megatron.generate.attention import Prefill, PrefillInLoops
    from hrm_megatron.generate.cache import CacheSize, PagedCache
    from hrm_megatron.generate.cpu import Loops

    lengths, tables = [1, 33, 16], [np.asarray([4]), np.asarray([5, 0, 2]), np.asarray([1])]
    caches = [PagedCache(CacheSize(6, 2, 3, 40, dtype)) for _ in range(2)]
    gqkv = torch.randn(sum(lengths), 4 * 120, generator=torch.Generator().manual_seed(2)).to(dtype)
    loops = PrefillInLoops(caches[0], lengths, tables, Loops(64, 40, 1e4), causal)(1, gqkv)
    stock = Prefill(caches[1], lengths, tables, 1e4, causal)(1, gqkv)
    # Gated attention is below 4, keys below 8: some roundings of 2^-24 in fp32, in bf16 one that falls otherwise.
    torch.testing.assert_close(loops, stock, rtol=0, atol=tolerance)
    torch.testing.assert_close(caches[0].pool, caches[1].pool, rtol=0, atol=2 * tolerance)
    assert torch.equal(caches[0].pool[1, 1], caches[1].pool[1, 1]) and caches[0].pool[1, 1].any()  # values bitwise
    assert not caches[0].pool[0].any() and not caches[0].pool[:, :, 3].any()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("sizes", [(1, 24, 3, 40, 2, 3), (2, 128, 4, 256, 2, 3)], ids=["small", "as the demo's"])
def test_greedy_answers_equal_transformers_generate(single_rank, sizes, rows):
    """50 prompts of mixed length, token for token; where the two best tokens are within the rounding of two
    computations of each other, either is right and the comparison ends. That happens to few."""
    from hrm_megatron.generate.decode import generate

    ours, theirs = models(sizes, seed=3)
    prompts = random_prompts(np.random.default_rng(4).integers(1, 60, 50), seed=6)
    new_tokens, ended = 12, 0
    answers = generate(ours, prompts, -1, 256, new_tokens, max_rows=rows)
    for first in range(0, 50, rows):
        batch = prompts[first:first + rows]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        live = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        out = theirs.generate(input_ids=ids, attention_mask=live, token_type_ids=live, max_new_tokens=new_tokens,
                              do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True)
        for row, answer in enumerate(answers[first:first + len(batch)]):
            for step, (have, want) in enumerate(zip(answer, out.sequences[row, width:].tolist(), strict=True)):
                if have != want:
                    best = out.logits[step][row].topk(2).values
                    assert best[0] - best[1] < 2 * TOLERANCE, (first + row, step)
                    ended += 1
                    break
    assert ended <= 1
