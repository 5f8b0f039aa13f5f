"""The model of lm-evaluation-harness: what it makes of the harness's requests."""
from types import SimpleNamespace

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.generate.sampling import Sampling
from tests.evaluate.conftest import CONTEXT, TOKENIZER

pytest.importorskip("lm_eval", reason="needs lm_eval, extra lm-eval")


@pytest.fixture(scope="module")
def model(checkpoint):
    from lm_eval.api.registry import get_model

    from hrm_megatron.evaluate import harness

    assert get_model("hrm_megatron") is harness.HrmMegatron
    return harness.HrmMegatron.create_from_arg_string(
        f"load={checkpoint},tokenizer={TOKENIZER},condition=synth+cot", dict(batch_size=2, device="cuda:0"))


def asked(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def test_a_continuation_is_scored_as_the_answer(model):
    from hrm_megatron.evaluate.likelihood import Pair, likelihoods

    spell = model.session.tokenizer
    found = model.loglikelihood(asked(("What is 1?", " one"), ("What is 1?", "two"), ("", "x")))
    pairs = [Pair(spell.encode_prefix("synth,cot", context), spell.encode_response(answer)[:-1])
             for context, answer in (("What is 1?", "one"), ("What is 1?", "two"), ("", "x"))]
    assert found == [(each.logprob, each.greedy) for each in likelihoods(model.session.decoder, pairs)]


def test_the_parts_of_a_long_text_add_up(model):
    from hrm_megatron.evaluate.likelihood import likelihoods, rolling

    text = "one two three " * CONTEXT
    [found] = model.loglikelihood_rolling(asked((text,)))
    spell = model.session.tokenizer
    parts = rolling(spell.encode_prefix("synth,cot", ""), spell.encode_response(text)[:-1], CONTEXT)
    assert len(parts) > 2 and found == sum(each.logprob for each in likelihoods(model.session.decoder, parts))


def test_answers_end_where_the_harness_wants_it(model):
    [whole, other] = model.generate_until(asked(("What is 1?", dict(max_gen_toks=12, until=[])),
                                                ("What is 2?", dict(max_gen_toks=3, until=[], do_sample=False))))
    assert len(whole) > 4 and len(other) <= len(whole)
    [cut] = model.generate_until(asked(("What is 1?", dict(max_gen_toks=12, until=[whole[2:4]]))))
    assert cut == whole[:whole.index(whole[2:4])]
    [greedy, cold, warm, stated] = [model._request(0, [1], settings).sampling for settings in (
        {}, dict(do_sample=True, temperature=0.0), dict(do_sample=True), dict(do_sample=False, temperature=2.0))]
    assert greedy == cold == stated == Sampling() and warm == Sampling(1.0)
    with pytest.raises(ConfigError, match="generation setting 'beams': unknown"):
        model.generate_until(asked(("What is 1?", dict(beams=2))))
