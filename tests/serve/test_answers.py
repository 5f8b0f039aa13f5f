"""Answers by OpenAI's API are those of tools/generate.py, in every form that the API has."""
import asyncio
import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from hrm_megatron.data.spelling import SPECIAL_TOKENS
from hrm_megatron.data.tokenizer import TextTokenizer

pytest.importorskip("fastapi")

QUESTIONS = ["What is 7 plus 5?", "Name the tens digit of 7543."]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# A logprob is a logit less the logarithm of a sum of them, each within the 2e-5 of tests/generate/test_engine.py. What
# reads the answer both ways is another function.
CLOSE, WRONG = 4e-5, 1e-3


def chunks_of(reply):
    events = [event.removeprefix("data: ") for event in reply.text.split("\n\n") if event]
    assert reply.headers["content-type"].startswith("text/event-stream") and events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def user(text):
    return [dict(role="user", content=text)]


def test_answers_are_those_of_the_tool_whatever_the_neighbours(served, answered):
    sampling = (1.5, 0.95, 7, 50, 0.01)
    how = dict(temperature=1.5, top_p=0.95, seed=7, top_k=50, min_p=0.01)
    greedy = [samples[0].text for samples in answered(QUESTIONS, max_new_tokens=20)]
    sampled = [[sample.text for sample in samples]
               for samples in answered(QUESTIONS, "cot,synth", sampling, samples=2, max_new_tokens=20)]

    async def work(server):
        async def send(path, **body):
            reply = await server.client.post(path, json=body)
            assert reply.status_code == 200, reply.text
            return reply
        found = await asyncio.gather(
            send(COMPLETIONS, prompt=QUESTIONS, max_tokens=20, temperature=0),
            send(COMPLETIONS, prompt=QUESTIONS, max_tokens=20, n=2, condition="cot,synth", **how),
            send(CHAT, messages=user(QUESTIONS[1]), max_completion_tokens=20, temperature=0),
            send(CHAT, messages=user(QUESTIONS[0]), max_tokens=20, n=2, condition="cot,synth", stream=True,
                 stream_options=dict(include_usage=True), **how),
            send(COMPLETIONS, prompt=QUESTIONS, max_tokens=20, temperature=0, stream=True))
        assert server.engine.idle and server.engine.cache.free == server.engine.cache.size.blocks
        return found
    one, two, three, four, five = served(work, rows=3)
    texts = [[choice["text"] for choice in reply.json()["choices"]] for reply in (one, two)]
    assert texts == [greedy, [*sampled[0], *sampled[1]]]
    assert [choice["index"] for choice in two.json()["choices"]] == [0, 1, 2, 3]
    assert three.json()["choices"][0]["message"] == dict(role="assistant", content=greedy[1], refusal=None)
    *chunks, last = chunks_of(four)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] <= 40
    streamed = ["", ""]
    for chunk in chunks:
        [choice] = chunk["choices"]
        streamed[choice["index"]] += choice["delta"]["content"]
    assert streamed == sampled[0]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks_of(five)
                   if chunk["choices"][0]["index"] == 1) == greedy[1]


def test_the_body_says_model_usage_and_finish(ask, answered, session):
    [[sample]] = answered(QUESTIONS[:1], max_new_tokens=9)
    body = ask(COMPLETIONS, dict(model="random", prompt=QUESTIONS[0], max_tokens=9, temperature=0)).json()
    prompt = len(session.tokenizer.encode_prefix("direct", QUESTIONS[0]))
    assert body["usage"] == dict(prompt_tokens=prompt, completion_tokens=len(sample.tokens),
                                 total_tokens=prompt + len(sample.tokens))
    assert (body["model"], body["object"], body["choices"][0]["finish_reason"]) \
        == ("random", "text_completion", sample.finish)
    again = ask(CHAT, dict(messages=user(QUESTIONS[0]), temperature=0, max_tokens=9)).json()
    assert again["object"] == "chat.completion" and again["system_fingerprint"] == body["system_fingerprint"]


def test_a_stop_string_ends_an_answer(ask, answered):
    [[sample]] = answered(QUESTIONS[:1], max_new_tokens=20)
    stop = sample.text[4:6]
    for body in (dict(stop=stop), dict(stop=["never there", stop])):
        [choice] = ask(COMPLETIONS, dict(prompt=QUESTIONS[0], temperature=0, max_tokens=20, **body)).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (sample.text[:sample.text.index(stop)], "stop")


def test_logprobs_are_those_of_the_tool(ask, answered, session):
    [[sample]] = answered(QUESTIONS[:1], max_new_tokens=12, logprobs=3)
    asked = dict(temperature=0, max_tokens=12)
    [choice] = ask(COMPLETIONS, dict(prompt=QUESTIONS[0], logprobs=3, **asked)).json()["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"] == pytest.approx([each.logprob for each in sample.logprobs], abs=CLOSE)
    assert [len(top) for top in found["top_logprobs"]] == [3] * len(sample.tokens)
    control = session.tokenizer.special_ids  # a random model writes some, which have no text
    assert "".join(token for token in found["tokens"] if token not in control) == choice["text"]
    assert all(choice["text"][start:].startswith(token) for token, start in
               zip(found["tokens"], found["text_offset"], strict=True) if token not in control)
    [choice] = ask(CHAT, dict(messages=user(QUESTIONS[0]), logprobs=True, top_logprobs=3, **asked)).json()["choices"]
    content = choice["logprobs"]["content"]
    assert [each["logprob"] for each in content] == pytest.approx(found["token_logprobs"], abs=CLOSE)
    assert b"".join(bytes(each["bytes"]) for each in content if each["token"] not in control).decode() \
        == choice["message"]["content"]
    assert [len(each["top_logprobs"]) for each in content] == [3] * len(content)


def test_a_continuation_is_scored_behind_a_prefix_that_is_read_both_ways(ask, session, checkpoints):
    """echo with logprobs of question and answer as token ids, against the training code's logits of PrefixLM."""
    from hrm_megatron.generate.decode import next_token_logits
    from hrm_megatron.generate.load import load_model, open_checkpoint

    prefix = session.tokenizer.encode_prefix("synth", QUESTIONS[0])
    answers = [session.tokenizer.encode_response(text) for text in ("12", "The sum is 12, surely.")]
    body = dict(prompt=[prefix + answer for answer in answers], max_tokens=0, echo=True, logprobs=1, temperature=0)
    reply = ask(COMPLETIONS, body).json()
    model = load_model(open_checkpoint(checkpoints))
    for answer, choice in zip(answers, reply["choices"], strict=True):
        found = choice["logprobs"]["token_logprobs"]
        assert found[:len(prefix)] == [None] * len(prefix) and len(found) == len(prefix) + len(answer)
        off = []
        for place, token in enumerate(answer):
            right, both_ways = (
                next_token_logits(model, [read], [seen])[0, :session.decoder.vocab_size].double().log_softmax(-1)[token]
                for read, seen in ((prefix, answer[:place]), (prefix + answer[:place], [])))
            assert abs(found[len(prefix) + place] - right) < CLOSE
            off.append(abs(found[len(prefix) + place] - both_ways).item())
        assert max(off) > WRONG
        assert choice["text"].startswith(QUESTIONS[0]) and choice["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 0
    # lm-eval asks for one token more, and reads all but the last.
    more = ask(COMPLETIONS, dict(body, max_tokens=1)).json()
    for less, choice in zip(reply["choices"], more["choices"], strict=True):
        assert choice["logprobs"]["token_logprobs"][len(prefix):-1] == pytest.approx(
            less["logprobs"]["token_logprobs"][len(prefix):], abs=CLOSE)


def test_token_ids_go_on_with_an_answer_that_has_begun(ask, answered, session):
    [[sample]] = answered(QUESTIONS[:1], max_new_tokens=20)
    prefix = session.tokenizer.encode_prefix("direct", QUESTIONS[0])
    whole, rest = (ask(COMPLETIONS, dict(prompt=prefix + sample.tokens[:given], max_tokens=20 - given, temperature=0))
                   .json()["choices"][0]["text"] for given in (0, 8))
    assert whole == sample.text and rest == session.text(sample.tokens[8:])


def test_an_echo_is_the_prompt_to_the_letter(served):
    """Whatever the tokenizer makes of it, whole and streamed: clients cut the prompt off by its length."""
    prompts = ["Cafe\u0301 abc", "  a  ", "a\0b", "<|im_end|> x"]

    async def work(server):
        body = dict(prompt=prompts, max_tokens=6, temperature=0)
        return [await server.client.post(COMPLETIONS, json=body | more) for more in (
            {}, dict(echo=True), dict(echo=True, stream=True))]
    plain, echoed, stream = served(work)
    want = [prompt + choice["text"] for prompt, choice in zip(prompts, plain.json()["choices"], strict=True)]
    assert [choice["text"] for choice in echoed.json()["choices"]] == want
    found = [""] * len(prompts)
    for chunk in chunks_of(stream):
        [choice] = chunk["choices"]
        found[choice["index"]] += choice["text"]
    assert found == want


def test_a_question_without_its_beginning_is_refused(ask, session):
    """As a client sends it that cuts what is too long from the left."""
    pair = session.tokenizer.encode_prefix("direct", QUESTIONS[0]) + session.tokenizer.encode_response("12")
    for body in (dict(echo=True, logprobs=1, max_tokens=0), dict(max_tokens=4)):
        replies = [ask(COMPLETIONS, dict(body, prompt=[pair, pair[begin:]], temperature=0)) for begin in (0, 1, 3)]
        assert [reply.status_code for reply in replies] == [200, 400, 400]
        error = replies[1].json()["error"]
        assert error["param"] == "prompt" and "<|im_end|> that do not begin with <|im_start|>" in error["message"]


def test_an_empty_answer_may_come_back(ask, answered):
    chat = [*user("Hello"), dict(role="assistant", content=""), *user("Who are you?")]
    [[sample]] = answered(["User: Hello\n\nUser: Who are you?"], max_new_tokens=10)
    assert ask(CHAT, dict(messages=chat, temperature=0, max_tokens=10)).json()["choices"][0]["message"]["content"] \
        == sample.text


def test_a_chat_is_spelled_as_in_training(ask, answered):
    chat = [dict(role="system", content="Be brief."), *user("Hello"), dict(role="assistant", content="Hi"),
            dict(role="user", content=[dict(type="text", text="Who "), dict(type="text", text="are you?")])]
    chat[2] |= dict(refusal=None, annotations=[], audio=None, tool_calls=None)  # as a client has it from a reply
    spelled = "Be brief.\n\nUser: Hello\n\nAssistant: Hi\n\nUser: Who are you?"
    [[sample]] = answered([spelled], max_new_tokens=10)
    assert ask(CHAT, dict(messages=chat, temperature=0, max_tokens=10)).json()["choices"][0]["message"]["content"] \
        == sample.text


def test_without_a_seed_answers_differ(served):
    async def work(server):
        body = dict(prompt=QUESTIONS[0], max_tokens=20, temperature=2)
        return {(await server.client.post(COMPLETIONS, json=body)).json()["choices"][0]["text"] for _ in range(3)}
    assert len(served(work)) == 3


def test_offsets_are_places_in_the_text_however_bytes_are_cut():
    """Whole, halved and broken characters, in tokens of 0 to 3 bytes."""
    from hrm_megatron.serve.spelled_tokens import TextOffsets

    rng = np.random.default_rng(4)
    alphabet = "aé€\U0001f600".encode()
    for _ in range(200):
        tokens = [bytes(rng.choice([*alphabet, *b"b\xe2\xf0\xff"], size=rng.integers(4))) for _ in range(6)]
        tokens += ["€\U0001f600".encode()[place:place + 2] for place in range(0, 7, 2)]
        data, offsets, start = b"".join(tokens), TextOffsets(), 0
        for token in tokens:
            place = offsets.take(token)
            if token:
                assert place == len(data[:start + 1].decode("utf-8", "replace")) - 1
            start += len(token)


def test_offsets_are_places_in_the_text_where_an_echo_ends_within_a_character(tmp_path):
    from hrm_megatron.data.tokenizer import MIN_VOCAB_SIZE, save_tokenizer, train_tokenizer
    from hrm_megatron.generate.engine import Request
    from hrm_megatron.generate.transcript import TokenLogprob, Transcript
    from hrm_megatron.serve.answers import Answers
    from hrm_megatron.serve.live_engine import Event
    from hrm_megatron.serve.spelled_tokens import TokenSpelling, byte_alphabet

    name_of = {byte: name for name, byte in byte_alphabet().items()}
    save_tokenizer(train_tokenizer(["a"], MIN_VOCAB_SIZE), tmp_path / "bytes")
    tokenizer = TextTokenizer(tmp_path / "bytes")
    ids = [tokenizer.tokenizer.token_to_id(name_of[byte]) for byte in "€b".encode()]
    prefix, transcript = tokenizer.encode_prefix("direct", "a"), Transcript(frozenset(), 4, decode=tokenizer.decode)
    answers = Answers([Request(prefix, 2, logprobs=0, given=ids[:2])], TokenSpelling(tokenizer), "", "", chat=False,
                      echo=[prefix + ids[:2]])
    for number, token in enumerate(ids):
        piece = transcript.give(token) if number < 2 else transcript.push(token)
        answers.take(Event(0, 0, number < 2, piece, transcript.finish, TokenLogprob(token, 0.0)))
    [choice] = answers.whole()["choices"]
    assert choice["text"] == "a\ufffd\ufffdb" and choice["logprobs"]["text_offset"][len(prefix):] == [1, 1, 2, 3]


def test_tokens_of_sentencepiece_are_named_by_their_text_within_an_answer(tmp_path):
    """Also where an answer would not begin with its space; half a character is its bytes."""
    from hrm_megatron.generate.transcript import TokenLogprob
    from hrm_megatron.serve.spelled_tokens import TextOffsets, TokenSpelling

    pieces = ["\u2581the", "\u2581end", "s", "<0xE4>", "\u4f60", "<0x73>"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    made.save(str(tmp_path / "tokenizer.json"))
    spelling = TokenSpelling(TextTokenizer(tmp_path))
    assert [spelling.text_of(token) for token in range(7)] == [
        " the", " end", "s", "bytes:\\xe4", "\u4f60", "s", SPECIAL_TOKENS[0]]
    assert [spelling.bytes_of(token) for token in (1, 3, 4)] == [b" end", b"\xe4", "\u4f60".encode()]
    [top] = spelling.completion_logprobs([], [TokenLogprob(2, -0.1, ((2, -0.1), (5, -2.5)))], TextOffsets())[
        "top_logprobs"]
    assert top == {"s": -0.1}  # of two tokens with one text the likeliest
