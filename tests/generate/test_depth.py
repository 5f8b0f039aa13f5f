"""Cycles other than in training against transformers, and early exit against models of just so many cycles."""
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from hrm_megatron.config import ConfigError
from tests.generate.test_decoder import SIZES, filled, random_prompts
from tests.model.test_transformers import TOLERANCE, models

LENGTHS = (7, 20, 1, 33, 16)
MOST = 4  # H cycles


@pytest.fixture(scope="module")
def exits(untrained):
    """A model, and a decoder that ends these prompts after different numbers of cycles."""
    from hrm_megatron.generate.decode import decoder_of
    from hrm_megatron.generate.decoder import Decoder

    model = untrained(*SIZES)
    moved = np.sort(np.asarray(prompt_changes(model, random_prompts(LENGTHS))).ravel())
    gaps = np.diff(moved) / moved[:-1]
    place = len(moved) // 3 + gaps[len(moved) // 3:2 * len(moved) // 3].argmax()  # farthest from any prompt's change
    return model, Decoder(decoder_of(model, 64).weights, 64, MOST, None, float(moved[place:place + 2].mean()))


def with_cycles(model, h_cycles, l_cycles):
    """The same model with other cycles, which its ticks are listed from."""
    model.config.architecture = replace(model.config.arch, h_cycles=h_cycles, l_cycles=l_cycles)
    return model


def prompt_changes(model, prompts):
    """||z_H(t) - z_H(t-1)|| / ||z_H(t)|| of each prompt [prompt][t], by the training code and one prompt at a time."""
    from hrm_megatron.data.batch import PackedBatch, assemble_row

    before, found = model.config.architecture, []
    with_cycles(model, MOST, before.l_cycles)
    for prompt in prompts:
        row = assemble_row([(np.asarray(prompt), np.asarray([0]))], len(prompt))
        batch, states = PackedBatch.from_rows({name: tensor[None] for name, tensor in row.items()}), []
        with torch.no_grad():
            model.states(batch, record=lambda name, value, kept=states: None if "z_L" in name else kept.append(value))
        found.append([((new - old).norm() / new.norm()).item() for old, new in itertools.pairwise(states)])
    model.config.architecture = before
    return found


@pytest.mark.parametrize(("h_cycles", "l_cycles"), [(2, 3), (1, 3), (3, 1), (4, 2)])
def test_other_cycles_are_those_of_transformers_with_its_configuration_changed(single_rank, parity, h_cycles, l_cycles):
    from hrm_megatron.generate.decode import decoder_of
    from hrm_megatron.generate.decoder import Decoder

    ours, theirs = models((2, 40, 5, 24, 2, 3), seed=4)
    theirs.config.H_cycles, theirs.config.L_cycles = h_cycles, l_cycles
    trained = decoder_of(ours, 64)
    decoder = Decoder(trained.weights, 64, h_cycles, l_cycles)
    [prompt], answer, found = random_prompts((19,)), random_prompts((6,), seed=2)[0], []
    cache, tables = filled(decoder, [prompt], 6)
    found.append(decoder.prefill([prompt], list(tables), cache).logits)
    for step, token in enumerate(answer):
        found.append(decoder.decode([token], np.asarray([19 + step], np.int32), tables, cache))
    kinds = torch.tensor([[1] * 19 + [0] * 6])
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor([prompt + answer]), token_type_ids=kinds, use_cache=False).logits[0, 18:]
    parity(f"logits of transformers, {h_cycles} x {l_cycles} cycles",
           (torch.cat(found) - want[:, :250]).abs().max().item(), TOLERANCE)
    cache, tables = filled(trained, [prompt], 6)
    as_trained = trained.prefill([prompt], list(tables), cache).logits
    assert torch.equal(found[0], as_trained) == ((h_cycles, l_cycles) == (2, 3))


def test_a_prompt_ends_with_the_first_cycle_that_changes_z_h_by_less(exits):
    model, decoder = exits
    prompts = random_prompts(LENGTHS)
    want = [next((t for t, moved in enumerate(each, 1) if moved < decoder.exit_threshold), MOST)
            for each in prompt_changes(model, prompts)]
    cache, tables = filled(decoder, prompts, 1)
    assert decoder.prefill(prompts, list(tables), cache).h_cycles.tolist() == want
    assert len({*want}) > 1, want  # else nothing was told apart


@pytest.mark.parametrize("gathered", [False, True])
def test_answers_of_mixed_depth_are_those_of_models_of_so_many_cycles(exits, monkeypatch, gathered):
    """All in one batch, each token's logits against the training code without a cache."""
    from hrm_megatron.generate.decode import next_token_logits

    model, decoder = exits
    if gathered:
        monkeypatch.setattr(decoder, "loops", None)
    prompts, trained = random_prompts(LENGTHS), model.config.architecture
    cache, tables = filled(decoder, prompts, 5)
    lengths, answers = np.asarray(LENGTHS, np.int32), [[] for _ in prompts]
    logits, cycles = decoder.prefill(prompts, list(tables), cache)
    for _ in range(5):
        for row, answer in enumerate(answers):
            with_cycles(model, int(cycles[row]), trained.l_cycles)
            want = next_token_logits(model, [prompts[row]], [answer])[0, :250]
            assert (logits[row] - want).abs().max() < TOLERANCE, (row, len(answer))
            answer.append(int(logits[row].argmax()))
        logits = decoder.decode([answer[-1] for answer in answers], lengths, tables, cache, cycles)
        lengths = lengths + 1
    model.config.architecture = trained


def test_an_engine_keeps_the_cycles_of_every_answer(exits):
    """With more answers than places, and samples that share a prompt: each as it is alone."""
    from hrm_megatron.generate.cache import PagedCache
    from hrm_megatron.generate.engine import Engine, Request

    _, decoder = exits

    def answers(prompts, rows):
        engine = Engine(decoder, PagedCache(decoder.cache_size(40)), rows)
        return [[(sample.h_cycles, sample.tokens) for sample in samples]
                for samples in engine.answer([Request(prompt, 6, samples=2) for prompt in prompts])]
    prompts = random_prompts(LENGTHS)
    together = answers(prompts, 3)
    assert together == [answers([prompt], 1)[0] for prompt in prompts]
    cache, tables = filled(decoder, prompts, 1)
    assert [samples[0][0] for samples in together] == decoder.prefill(prompts, list(tables), cache).h_cycles.tolist()


def test_a_threshold_that_no_change_falls_below_leaves_every_bit(untrained):
    from hrm_megatron.generate.decode import decoder_of
    from hrm_megatron.generate.decoder import Decoder

    plain = decoder_of(untrained(*SIZES), 64)
    never = Decoder(plain.weights, 64, exit_threshold=1e-30)
    found = []
    for decoder in (plain, never):
        cache, tables = filled(decoder, random_prompts(LENGTHS), 2)
        logits, cycles = decoder.prefill(random_prompts(LENGTHS), list(tables), cache)
        tokens, lengths = logits.argmax(-1).tolist(), np.asarray(LENGTHS, np.int32)
        found.append([logits, decoder.decode(tokens, lengths, tables, cache, cycles)])
    assert cycles.tolist() == [2] * len(LENGTHS)
    assert all(map(torch.equal, *found))


def test_early_exit_without_effect_is_refused(untrained):
    from hrm_megatron.generate.decode import decoder_of
    from hrm_megatron.generate.decoder import Decoder
    from hrm_megatron.generate.session import Answering

    weights = decoder_of(untrained(*SIZES), 64).weights
    with pytest.raises(ConfigError, match="exit threshold 0.1: has no effect.*or give more --h-cycles"):
        Decoder(weights, 64, 1, None, 0.1)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="exit_threshold=.*: must be a number above 0"):
            Answering(exit_threshold=wrong)
