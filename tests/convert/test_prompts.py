"""Ways to prompt an export: which of them read a prompt both ways, each against our own logits."""
from __future__ import annotations

import shutil
import sys
from collections import Counter

import jinja2
import pytest
import torch
from transformers import GenerationConfig, dynamic_module_utils, pipeline

from hrm_megatron.convert import prefix_generate
from hrm_megatron.convert.chat_template import chat_template
from hrm_megatron.convert.checkpoint import EMA
from hrm_megatron.convert.comparison import Loaded, logits_of
from hrm_megatron.data.chat import chat_examples
from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.spelling import Spelling
from tests.convert.test_export import (  # noqa: F401  # fixtures
    QUESTIONS,
    checkpoint,
    export,
    loaded,
    of_ours,
    tokenizer,
    without_ends,
)


def test_the_chat_template_spells_prompts_as_training_does(loaded, tokenizer):  # noqa: F811
    theirs, _ = loaded
    chats = [[dict(role="user", content=question)] for question in QUESTIONS]
    batch = theirs.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_dict=True,
                                       condition="cot, direct")
    for i, question in enumerate(QUESTIONS):
        prompt = tokenizer.encode_prefix("cot,direct", question)
        assert [token for token, type_id in zip(batch["input_ids"][i], batch["token_type_ids"][i], strict=True)
                if type_id] == prompt
    assert theirs.apply_chat_template(chats[0], return_dict=True)["input_ids"] == tokenizer.encode_prefix("", "three")


def test_a_control_token_beyond_the_basic_plane_stays_one_character():
    spelling = Spelling("<|\U0001f914|>", tags={"kurz": "<|\u00e9|>"})
    template = jinja2.Environment().from_string(chat_template(spelling))
    assert template.render(messages=[dict(role="user", content="hi")], condition="kurz") \
        == "<|\U0001f914|><|\u00e9|>hi<|im_end|>"


CHAT = [dict(role="user", content="three plus four?"), dict(role="assistant", content="three"),
        dict(role="user", content="What is four?")]
CHATS = [CHAT, [dict(role="system", content="What!"), *CHAT], [dict(role="system", content="  "), *CHAT[:1]],
         [dict(role="developer", content="four "), dict(role="user", content=[dict(type="text", text="What "),
                                                                            dict(type="text", text="is")])],
         [*CHAT[:2], dict(role="tool", content=""), dict(role="system", content="plus"),
          dict(role="human", content="4")],
         [*CHAT[:1], dict(role="ipython", content="\n3")]]


@pytest.mark.parametrize("chat", CHATS)
def test_the_chat_template_spells_chats_as_they_are_prepared(loaded, tokenizer, chat):  # noqa: F811
    row = {"messages": [*chat, dict(role="assistant", content="seven")]}
    prefix = chat_examples(row, "here", RowFormat(default_condition=""), Counter())[-1].instruction
    spelled = loaded[0].apply_chat_template(chat, return_dict=True, condition="direct")
    assert spelled["input_ids"] == tokenizer.encode_prefix("direct", prefix)
    assert {*spelled["token_type_ids"]} == {1}


@pytest.mark.parametrize("chat, condition, message", [
    (CHAT[:2], "", "the last message must ask something; an answer is the second text of a pair"),
    ([dict(role="system", content="What!")], "", "the last message must ask something"),
    (CHAT, "x", "unknown tag x; use direct, cot, noisy, synth"),
    ([dict(role="narrator", content="four")], "", "unknown role narrator; use one of system, developer, user"),
    ([dict(role="user", content=" ")], "", "an empty turn of the role user"),
    ([dict(role="user", content=[dict(type="image")])], "", "this model reads text, not image"),
    ([CHAT[0], dict(role="assistant", content="4", tool_calls=[{}, {}]), CHAT[2]], "", "a call of a tool would be"),
])
def test_a_chat_that_no_example_is_made_of_is_refused(loaded, chat, condition, message):  # noqa: F811
    with pytest.raises(Exception, match=message):
        loaded[0].apply_chat_template(chat, condition=condition)


def our_logits(checkpoint, rows):  # noqa: F811
    """Logits of our own model at all positions but the last of each (prefix, target)."""
    logits = logits_of(Loaded(checkpoint.path, "megatron", checkpoint, EMA), checkpoint.architecture, rows)
    return logits.split([len(prefix) + len(target) - 1 for prefix, target in rows])


def assert_near(theirs, ours):
    assert theirs.shape == ours.shape
    assert float((theirs - ours).abs().max()) < 2e-5 * max(1.0, float(ours.abs().max()))


@torch.no_grad()
def test_pairs_have_the_logits_of_our_model_and_one_text_has_not(loaded, checkpoint, tokenizer):  # noqa: F811
    theirs, model = loaded
    spelling = tokenizer.spelling
    prompts = [f"{spelling.boq}{question}{spelling.eoq}" for question in QUESTIONS[:2]]
    answers = [f"{answer}{spelling.eoa}" for answer in ("four plus", "seven")]
    rows = [(tokenizer.encode_prefix("", question), tokenizer.encode_response(answer))
            for question, answer in zip(QUESTIONS, ("four plus", "seven"), strict=False)]
    pairs = theirs(prompts, answers, padding=True, return_tensors="pt")
    words = checkpoint.architecture.vocab_size
    ours = our_logits(checkpoint, rows)
    for logits, mask, expected in zip(model(**pairs).logits, pairs["attention_mask"], ours, strict=True):
        assert_near(logits[mask.bool()][:-1, :words], expected)
    for wrong in (theirs(prompts[0] + answers[0], return_tensors="pt"),  # an answer that sees its own end
                  dict(input_ids=torch.tensor([[*rows[0][0], *rows[0][1]]]))):  # a causal prompt
        assert float((model(**wrong).logits[0, :-1, :words] - ours[0]).norm() / ours[0].norm()) > 0.05


@torch.no_grad()
def test_a_second_turn_of_a_chat_has_the_logits_and_the_answer_of_our_model(loaded, checkpoint, tokenizer):  # noqa: F811
    theirs, model = loaded
    batch = theirs.apply_chat_template([CHAT, CHAT[:1]], padding=True, return_dict=True, return_tensors="pt")
    texts = ["User: three plus four?\n\nAssistant: three\n\nUser: What is four?", "three plus four?"]
    prompts = [tokenizer.encode_prefix("", text) for text in texts]
    words = checkpoint.architecture.vocab_size
    for logits, mask, expected in zip(model(**batch).logits, batch["attention_mask"],
                                      our_logits(checkpoint, [(prompt, [0]) for prompt in prompts]), strict=True):
        assert_near(logits[mask.bool()][:, :words], expected)
    output = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert without_ends(model, output, batch["input_ids"].shape[1]) == of_ours(checkpoint, tokenizer, prompts, 6)


def test_pipelines_are_causal_and_right_with_the_code_of_the_folder(export, loaded, checkpoint, tokenizer,  # noqa: F811
                                                                    monkeypatch, tmp_path):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    spelling = tokenizer.spelling
    texts = [f"{spelling.boq}{question}{spelling.eoq}" for question in QUESTIONS]
    options = dict(max_new_tokens=6, do_sample=False, return_full_text=False)
    ours = of_ours(checkpoint, tokenizer, [tokenizer.encode_prefix("", question) for question in QUESTIONS], 6)

    def answers(folder=export, **trust):
        asked = pipeline("text-generation", model=str(folder), device="cpu", **trust)
        return [out[0]["generated_text"] for out in asked(texts, batch_size=len(texts), **options)], asked.model

    (trusted, model), (causal, _) = answers(trust_remote_code=True), answers()
    assert trusted == [tokenizer.decode(answer) for answer in ours] != causal
    for part in loaded:
        part.save_pretrained(tmp_path / "again")
    assert answers(tmp_path / "again", trust_remote_code=True)[0] == causal  # as the card says
    shutil.copytree(export / "custom_generate", tmp_path / "again" / "custom_generate")
    assert answers(tmp_path / "again", trust_remote_code=True)[0] == trusted
    ids = torch.tensor([tokenizer.encode_prefix("", QUESTIONS[0])])
    for asked in (model.generate(ids, max_new_tokens=6), model.generate(input_ids=ids, max_new_tokens=6)):
        assert without_ends(model, asked, ids.shape[1]) == ours[:1]
    types = torch.zeros_like(ids)  # those that are given stay
    assert without_ends(model, model.generate(ids, token_type_ids=types, max_new_tokens=6), ids.shape[1]) \
        == without_ends(model, type(model).generate(model, ids, max_new_tokens=6), ids.shape[1])


@torch.no_grad()
def test_candidates_of_an_assistant_are_another_function_and_refused(loaded, tokenizer):  # noqa: F811
    model = loaded[1]
    ids = torch.tensor([tokenizer.encode_prefix("", QUESTIONS[3])])
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    first = [model.generate(ids, token_type_ids=torch.ones_like(ids), **options, **more).logits[0]
             for more in ({}, dict(assistant_model=model))]
    assert float((first[1] - first[0]).norm() / first[0].norm()) > 0.01
    for given in (dict(assistant_model=model), dict(prompt_lookup_num_tokens=3), dict(assistant_early_exit=1),
                  dict(generation_config=GenerationConfig(prompt_lookup_num_tokens=3))):
        with pytest.raises(ValueError, match="the first candidates .* would be read both ways") as refused:
            prefix_generate.generate(ids, model=model, **given)
        assert "\n" not in str(refused.value)


@torch.no_grad()
@pytest.mark.parametrize("setting", [dict(use_cache=False), dict(prefill_chunk_size=3)], ids=str)
def test_generation_without_a_cache_or_in_chunks_is_another_function_and_refused(loaded, tokenizer,  # noqa: F811
                                                                                 monkeypatch, setting):
    model = loaded[1]
    ids = torch.tensor([tokenizer.encode_prefix("", QUESTIONS[3])])
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)

    def logits(**more):
        found = model.generate(ids, token_type_ids=torch.ones_like(ids), **options, **more).logits
        return torch.stack(found[:2])  # the second is of an answer of one token

    right = logits()
    assert torch.equal(logits(use_cache=True), right)
    assert float((logits(**setting) - right).norm() / right.norm()) > 0.01
    for given in (setting, dict(generation_config=GenerationConfig(**setting))):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* would be read both ways"):
            prefix_generate.generate(ids, model=model, **given)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**setting))
    with pytest.raises(ValueError, match="would be read both ways"):
        prefix_generate.generate(ids, model=model)
