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
    return [SimpleNamespace(args=each, task_name="toy", doc_id=number, repeats=1)
            for number, each in enumerate(arguments)]


def test_a_continuation_is_scored_as_the_answer(model):
    from hrm_megatron.evaluate.likelihood import Pair, likelihoods

    spell = model.session.tokenizer
    found = model.loglikelihood(asked(("What is 1?", " one"), ("What is 1?", "two"), ("", "x")))
    pairs = [Pair(spell.encode_prefix("synth,cot", context), spell.encode_response(answer)[:-1])
             for context, answer in (("What is 1?", "one"), ("What is 1?", "two"), ("", "x"))]
    assert found == [(each.logprob, each.greedy) for each in likelihoods(model.session.decoder, pairs)]


def test_a_context_that_is_too_long_loses_its_beginning(model, caplog):
    from hrm_megatron.evaluate.likelihood import Pair, likelihoods

    spell, context = model.session.tokenizer, " ".join(map(str, range(CONTEXT)))
    answer, whole = spell.encode_response("one")[:-1], spell.encode_prefix("synth,cot", context)
    kept = CONTEXT + 1 - len(answer) - 4  # beside boq, two tags and eoq
    found = model.loglikelihood(asked(("What is 1?", "one"), (context, "one")))
    prompts = spell.encode_prefix("synth,cot", "What is 1?"), [*whole[:3], *whole[-kept - 1:]]
    assert len(whole) > CONTEXT and found == [(each.logprob, each.greedy) for each in likelihoods(
        model.session.decoder, [Pair(prompt, answer) for prompt in prompts])]
    assert [record.message for record in caplog.records if record.name.endswith("harness")] == [
        f"1 of 2 contexts do not fit the model's {CONTEXT} tokens beside their answers: their beginnings are cut off"]
    requests, stock = [], model.session.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.session, "answer", lambda wanted, *rest: requests.extend(wanted) or stock(wanted, *rest))
        model.generate_until(asked((context, dict(max_gen_toks=2)), (context, dict(max_gen_toks=CONTEXT, until=["1"]))))
    assert [len(request.prompt) for request in requests] == [CONTEXT - 2, CONTEXT // 2]
    with pytest.raises(ConfigError, match="task toy, document 1: its answer leaves no room for a prompt in"):
        model.loglikelihood(asked(("q", "one"), ("q", context)))


def test_random_numbers_belong_to_the_document(model, monkeypatch):
    requests = []
    monkeypatch.setattr(model.session, "answer", lambda wanted, *_: requests.extend(wanted) or [])
    some = [SimpleNamespace(args=("q", {}), task_name=task, doc_id=number, repeats=2)
            for task in "ab" for number in (0, 3) for _ in range(2)]
    model.generate_until(some)
    assert [request.stream for request in requests] == [0, 1, 6, 7] * 2


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(dtype="float16"), "dtype=float16: choose from float32, bfloat16"),
    (dict(nosuch=1), "--model_args: nosuch=1: unknown; give load, condition, tokenizer"),
    (dict(strip="no"), "strip=no: give True or False"),
    (dict(h_cycles="two"), "h_cycles=two: give a number of cycles"),
    (dict(load=None), "--model_args: load is missing; give load"),
    (dict(condition="loud"), "unknown tag 'loud'"),
])
def test_wrong_arguments_are_refused_by_name(checkpoint, arguments, message):
    from hrm_megatron.evaluate.harness import HrmMegatron

    with pytest.raises(ConfigError, match=message):
        HrmMegatron(**dict(load=str(checkpoint), tokenizer=str(TOKENIZER)) | arguments)


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


def test_a_cache_is_that_of_one_model(checkpoint, tmp_path):
    """The harness' own key is the request alone."""
    from lm_eval.api.model import CachingLM

    from hrm_megatron.evaluate.harness import HrmMegatron

    def cached(name="cache", **arguments):
        return CachingLM(HrmMegatron(str(checkpoint), tokenizer=str(TOKENIZER), **arguments), str(tmp_path / name))
    first, wanted = cached(), asked(("What is 1?", "one"))
    found = first.loglikelihood(wanted)
    again = cached(batch_size=3)
    again.lm.loglikelihood = None  # whose answers are there
    assert again.loglikelihood(wanted) == found
    for change in (dict(weights="raw"), dict(condition="synth"), dict(dtype="bfloat16"), dict(h_cycles=1),
                   dict(strip=False)):
        with pytest.raises(ConfigError, match=r"cache: was begun with .* or give another name as --use_cache"):
            cached(**change)
    assert cached().loglikelihood(wanted) == found
    with first.dbdict.__class__(str(tmp_path / "other"), autocommit=True) as other:
        other["request"] = (-1.0, False)
    with pytest.raises(ConfigError, match="other: does not say which model answered; give another name"):
        cached("other")


def test_a_chat_is_a_prompt_as_in_training(model):
    question = [dict(role="user", content="What is 1?")]
    assert model.apply_chat_template(question) == "What is 1?"
    shots = [dict(role="system", content="Count."), *question, dict(role="assistant", content="one"), *question]
    assert model.apply_chat_template(shots) == "Count.\n\nUser: What is 1?\n\nAssistant: one\n\nUser: What is 1?"
    with pytest.raises(ConfigError, match=r"--apply_chat_template: a task begins the answer itself \(gen_prefix\)"):
        model.apply_chat_template([*question, dict(role="assistant", content="So")], add_generation_prompt=False)
    for odd in (dict(role="critic", content="1"), dict(role="user", content=[dict(type="text", text="1")])):
        with pytest.raises(ConfigError, match="--apply_chat_template: a turn of .* is no text of"):
            model.apply_chat_template([*question, odd])


@pytest.mark.parametrize(("answer", "message"), [
    (" ", "task toy, document 1: answer ' ' has no token to score; pass strip=False, or leave the task out"),
    ("", "task toy, document 1: answer '' has no token to score; leave the task out"),
    ("x\ud800", r"task toy, document 1: answer 'x\\ud800': not UTF-8 at character 2; correct it"),
])
def test_an_answer_that_cannot_be_scored_is_named(model, answer, message):
    with pytest.raises(ConfigError, match=message):
        model.loglikelihood(asked(("q", "one"), ("q", answer)))


def test_what_the_harness_refuses_is_one_line(monkeypatch, capsys):
    from lm_eval.__main__ import cli_evaluate

    from hrm_megatron.evaluate.__main__ import refusing
    from hrm_megatron.program import one_line

    monkeypatch.setattr("sys.argv", ["lm_eval", "run", "--model", "hrm_megatron", "--tasks", "nosuch"])
    assert one_line(refusing(cli_evaluate)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: Tasks not found: nosuch"
    with pytest.raises(ValueError, match="invalid literal"):  # a fault of ours keeps its lines
        refusing(lambda: int("x"))()
