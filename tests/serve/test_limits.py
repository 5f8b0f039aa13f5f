"""What the server refuses, by name and in OpenAI's shape, and that nothing it is sent takes it down."""
import asyncio
import json
import threading
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("fastapi")

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = dict(prompt="What is 7 plus 5?", max_tokens=4, temperature=0)
GOOD_CHAT = dict(messages=[dict(role="user", content="Hello")], max_tokens=4, temperature=0)


def error_of(reply, status=400):
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


@pytest.mark.parametrize(("path", "change", "message"), [
    (COMPLETIONS, dict(frequency_penalty=0.5), "frequency_penalty: is without effect here; leave it out"),
    (COMPLETIONS, dict(best_of=3), "best_of: is without effect here"),
    (COMPLETIONS, dict(user="me"), "user: is without effect here"),
    (CHAT, dict(tools=[dict(type="function")]), "tools: is without effect here"),
    (CHAT, dict(parallel_tool_calls=0), "parallel_tool_calls: is without effect here"),
    (CHAT, dict(top_logprobs=2), "top_logprobs: is without effect unless logprobs is true"),
    (CHAT, dict(stream_options=dict(include_usage=True)), "stream_options: is without effect unless stream"),
    (CHAT, dict(stream=True, stream_options=dict(include_obfuscation=True)),
     "stream_options.include_obfuscation: is without effect here; leave it out"),
    (CHAT, dict(max_completion_tokens=3), "max_tokens: is the old name of max_completion_tokens"),
    (COMPLETIONS, dict(top_p=0.5), "top_p, top_k and min_p are without effect at temperature=0"),
    (COMPLETIONS, dict(prompt=[1, 2, 3], condition="cot"), "condition: is without effect on token ids"),
    (COMPLETIONS, dict(max_new_tokens=3), "max_new_tokens: unknown parameter; leave it out"),
    (COMPLETIONS, dict(temperature=-1.0), "temperature=-1.0: must be 0 (greedy) or positive"),
    (COMPLETIONS, dict(temperature="0"), "temperature: Input should be a valid number"),
    (COMPLETIONS, dict(max_tokens=0), "max_tokens: 0 answers nothing"),
    (COMPLETIONS, dict(max_tokens=4090), "more exceed the model's context of 4096"),
    (COMPLETIONS, dict(prompt="many " * 5000), "more exceed the model's context of 4096"),
    (COMPLETIONS, dict(prompt="  "), "prompt: empty instruction"),
    (COMPLETIONS, dict(prompt=["x", ""]), "prompt 1: empty instruction"),
    (COMPLETIONS, dict(prompt="<|im_start|>x<|im_end|>"), "control tokens in a text are text"),
    (COMPLETIONS, dict(prompt=[5, 1 << 40]), f"token {1 << 40} is not below the vocabulary's size of"),
    (COMPLETIONS, dict(echo=True, logprobs=1), "this prompt is a question alone, which is read both ways"),
    (COMPLETIONS, dict(prompt=["x"] * 99), "99 prompts at once; send at most 16"),
    (COMPLETIONS, dict(condition="loud"), "unknown tag 'loud'"),
    (COMPLETIONS, dict(n=0), "n: Input should be greater than or equal to 1"),
    (COMPLETIONS, dict(stop=""), "stop: must be a text or a list of at most 16 texts, none of them empty"),
    (CHAT, dict(messages=[]), "messages: List should have at least 1 item"),
    (CHAT, dict(messages=[dict(role="tool", content="x")]), "messages.0.role: Input should be 'system'"),
    (CHAT, dict(messages=[dict(role="user", content=" ")]), "messages.0.content: empty"),
    (CHAT, dict(messages=[*GOOD_CHAT["messages"], dict(role="assistant", content="")] * 2), "the last is of the role"),
    (CHAT, dict(messages=[dict(role="assistant", content="x")]), "end with a question of the user"),
])
def test_a_body_is_refused_by_name(ask, path, change, message):
    error = error_of(ask(path, (GOOD if path == COMPLETIONS else GOOD_CHAT) | change))
    assert message in error["message"] and error["type"] == "invalid_request_error"


def test_a_value_of_no_type_that_is_taken_is_told_the_types(served):
    """By its own name: a union's errors name the types of ours that were tried."""
    content = "messages.0.content: must be a text or a list of {"
    image = dict(type="image_url", image_url=dict(url="x"))
    bodies = [(COMPLETIONS, GOOD | change, message) for change, message in (
        (dict(stop=["x"] * 17), "stop: must be a text or a list of at most 16 texts"),
        (dict(prompt=[-1]), "prompt: must be a text, token ids (integers from 0 on), or a list of texts or"),
        (dict(prompt=[[]]), "no list may be empty"),
        (dict(max_tokens=0, echo=True), "max_tokens: 0 scores the answer that a prompt has begun"))]
    bodies += [(CHAT, dict(messages=[dict(role="user", content=value)]), content) for value in (None, 3, [image])]

    async def work(server):
        return [await server.client.post(path, json=body) for path, body, _ in bodies]
    for reply, (_, _, message) in zip(served(work), bodies, strict=True):
        error = error_of(reply)
        assert message in error["message"] and error["param"] == error["message"].split(":")[0]


def test_a_parameter_that_is_judged_with_others_is_named(served):
    bodies = ((COMPLETIONS, GOOD | dict(best_of=3)), (COMPLETIONS, GOOD | dict(max_tokens=0)),
              (COMPLETIONS, GOOD | dict(stream_options={})),
              (CHAT, GOOD_CHAT | dict(stream=True, stream_options=dict(include_obfuscation=1))),
              (CHAT, GOOD_CHAT | dict(top_logprobs=2)), (CHAT, GOOD_CHAT | dict(max_completion_tokens=3)),
              (CHAT, GOOD_CHAT | dict(user="me")))

    async def work(server):
        return [await server.client.post(path, json=body) for path, body in bodies]
    assert [error_of(reply)["param"] for reply in served(work)] == [
        "best_of", "max_tokens", "stream_options", "stream_options.include_obfuscation", "top_logprobs", "max_tokens",
        "user"]


def test_values_that_ask_for_nothing_are_taken(ask):
    nothing = dict(frequency_penalty=0, presence_penalty=0.0, logit_bias={}, user=None, best_of=1, suffix=None)
    assert ask(COMPLETIONS, GOOD | nothing).status_code == 200
    assert ask(COMPLETIONS, GOOD | dict(n=2, best_of=2)).status_code == 200
    assert ask(CHAT, GOOD_CHAT | dict(tools=[], response_format=dict(type="text"))).status_code == 200
    for options in (dict(include_obfuscation=False), dict(include_obfuscation=None, include_usage=None)):
        assert ask(CHAT, GOOD_CHAT | dict(stream=True, stream_options=options)).status_code == 200


def test_a_chat_that_names_no_length_gets_what_the_cache_leaves(ask):
    blocks, block = 4, 16
    body = dict(messages=GOOD_CHAT["messages"], temperature=0)
    reply = ask(CHAT, body, blocks=blocks)
    assert reply.status_code == 200, reply.text
    prompt, answer = (reply.json()["usage"][name] for name in ("prompt_tokens", "completion_tokens"))
    room = (blocks - 1) * block + 1 - prompt  # the prompt's last block is copied, the last token is never written
    assert prompt % block and reply.json()["choices"][0]["finish_reason"] == "length" and answer == room
    for more, status in ((0, 200), (1, 400)):
        reply = ask(CHAT, dict(body, max_tokens=room + more), blocks=blocks)
        assert reply.status_code == status, reply.text
    error = error_of(reply)
    assert error["param"] == "max_tokens" and f"key-value cache (--cache-tokens), which leaves room for {room};" in \
        error["message"]


@pytest.mark.parametrize("change", [
    dict(messages=[{}] * 999), dict(messages=[{"a": 1}] * 999), dict(messages=[dict.fromkeys(map(str, range(999)), 1)]),
    dict(messages=GOOD_CHAT["messages"] * ((1 << 14) + 1)), dict.fromkeys(map(str, range(999)), 1),
    dict(stream=True, stream_options=dict.fromkeys(map(str, range(999)), 1)),
])
def test_a_body_is_not_searched_for_more_than_its_first_errors(change):
    """Which takes seconds for all of a large one, while nobody is served."""
    from pydantic import ValidationError

    from hrm_megatron.serve.fields import ChatBody

    with pytest.raises(ValidationError) as refused:
        ChatBody.model_validate(GOOD_CHAT | change)
    assert refused.value.error_count() < 4


def test_the_first_error_in_a_list_of_prompts_ends_it():
    from pydantic import ValidationError

    from hrm_megatron.serve.fields import CompletionBody

    for values in ([-1] * 999, [[]] * 999, [1.5] * 999):
        with pytest.raises(ValidationError) as refused:
            CompletionBody.model_validate(GOOD | dict(prompt=values))
        assert refused.value.errors()[0]["ctx"]["error"].__cause__.error_count() < 9


def test_one_of_many_unknown_names_is_refused_by_name(ask):
    """Also behind those that are null, which ask for nothing."""
    nothing, more = dict.fromkeys(map(str, range(120))), dict.fromkeys(map(str, range(120, 240)), 1)
    for body, place in ((GOOD_CHAT | nothing | more, "120"),
                        (GOOD_CHAT | dict(messages=[GOOD_CHAT["messages"][0] | nothing | more]), "messages.0.120")):
        assert error_of(ask(CHAT, body)) == dict(message=f"{place}: unknown parameter; leave it out", param=place,
                                                 type="invalid_request_error", code=None)


def test_a_text_that_can_never_fit_is_not_spelled_whole(ask, session, monkeypatch):
    def spelled(*_):
        raise AssertionError("spelled")
    monkeypatch.setattr(type(session.tokenizer), "encode_prefixes", spelled)
    text = "1" * (16 * 4096 + 1)
    chat = [dict(role="user", content=text)]
    for path, body in ((COMPLETIONS, dict(prompt=["x", text])), (CHAT, dict(messages=chat))):
        error = error_of(ask(path, body))
        assert error["code"] == "context_length_exceeded" and error["message"].endswith(
            "65537 characters, of which the first 65536 alone exceed the model's context of 4096 tokens; shorten the "
            "prompt")


def test_a_prompt_has_its_place_while_it_is_spelled(served, session, monkeypatch):
    """And gives it back where it is refused."""
    begun, go_on, stock = threading.Event(), threading.Event(), type(session.tokenizer).encode_prefixes

    def spelled(*args):
        begun.set()
        assert go_on.wait(60)
        return stock(*args)
    monkeypatch.setattr(type(session.tokenizer), "encode_prefixes", spelled)

    async def work(server):
        first = asyncio.ensure_future(server.client.post(COMPLETIONS, json=GOOD | dict(max_tokens=4096)))
        assert await asyncio.to_thread(begun.wait, 60)
        second = asyncio.ensure_future(server.client.post(COMPLETIONS, json=GOOD))
        await asyncio.wait([second], timeout=1)
        go_on.set()
        return await second, await first, server.live.prompts
    second, first, left = served(work, max_prompts=1)
    assert "1 prompts are being answered or wait" in error_of(second, 429)["message"]
    assert "exceed the model's context" in error_of(first)["message"] and left == 0


def test_a_prompt_without_finite_logits_gets_an_error_alone(served, session, monkeypatch):
    boq, bad = session.tokenizer.boq, session.tokenizer.eoq  # which the answer to the good one has not
    embedding = session.decoder.weights.embedding.clone()
    embedding[bad] = np.nan
    monkeypatch.setattr(session.decoder, "weights", replace(session.decoder.weights, embedding=embedding))

    async def work(server):
        post = server.client.post
        replies = await asyncio.gather(*(post(COMPLETIONS, json=GOOD | change) for change in (
            dict(prompt=[[3, 4], [boq, bad, 4]]), dict(prompt=[3, 4], max_tokens=40),
            dict(prompt=[boq, bad], stream=True))))
        return *replies, await server.client.get("/health"), server.live.prompts
    failed, good, stream, health, left = served(work)
    message = "the model's logits are not finite; send another, or serve other weights"
    assert error_of(failed, 500)["message"] == f"prompt 1: {message}" and message in stream.text
    assert (good.status_code, health.status_code, left) == (200, 200, 0)


def test_prompts_are_counted_before_they_are_spelled(served, session, monkeypatch):
    def spelled(*_):
        raise AssertionError("spelled")
    monkeypatch.setattr(type(session.tokenizer), "encode_prefixes", spelled)

    async def work(server):
        return await server.client.post(COMPLETIONS, json=GOOD | dict(prompt=["x"] * 17))
    assert "17 prompts at once; send at most 16" in error_of(served(work))["message"]


def test_a_body_of_too_many_logprobs_is_refused(ask):
    """128 answers of 196 tokens, each with 20 others."""
    body = GOOD | dict(n=128, logprobs=20)
    error = error_of(ask(COMPLETIONS, body | dict(max_tokens=196)))
    assert error["param"] == "logprobs" and "up to 526848 of them in one body" in error["message"]


def test_another_model_is_not_found(ask):
    error = error_of(ask(COMPLETIONS, GOOD | dict(model="gpt-5")), 404)
    assert error["code"] == "model_not_found" and "this is 'random'" in error["message"]


def test_a_large_body_is_refused_before_it_is_read(ask):
    assert "more than 2000 bytes" in error_of(
        ask(COMPLETIONS, GOOD | dict(prompt="x" * 3000), body_bytes=2000), 413)["message"]

    async def endless():
        while True:
            yield b" " * 500
    body = endless()
    assert error_of(ask(COMPLETIONS, body, body_bytes=2000), 413)


def test_a_full_queue_is_told_to_wait(served):
    async def work(server):
        replies = await asyncio.gather(*(server.client.post(COMPLETIONS, json=GOOD | dict(prompt=["x", "y"]))
                                         for _ in range(5)))
        after = await server.client.post(COMPLETIONS, json=GOOD)
        return replies, after, server.live.prompts
    replies, after, left = served(work, rows=1, max_prompts=4)
    refused = [reply for reply in replies if reply.status_code != 200]
    assert len(refused) == 3 and after.status_code == 200 and left == 0
    for reply in refused:
        assert error_of(reply, 429)["type"] == "rate_limit_error" and reply.headers["retry-after"]


def test_an_answer_in_no_time_is_ended(served):
    async def work(server):
        late = await server.client.post(COMPLETIONS, json=GOOD | dict(max_tokens=4000))
        stream = await server.client.post(COMPLETIONS, json=GOOD | dict(max_tokens=4000, stream=True))
        return late, stream, server.live.prompts, server.guard.statuses
    late, stream, left, statuses = served(work, timeout_seconds=1e-6)
    assert error_of(late, 504)["type"] == "timeout_error" and left == 0
    assert late.headers["x-should-retry"] == "false" and statuses == {(COMPLETIONS, 504): 2}
    error, done = [event for event in stream.text.split("\n\n") if event]
    assert "took more than 1e-06 seconds" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]"


def test_a_key_opens_everything_but_page_and_health(served):
    async def work(server):
        get = server.client.get
        closed = [await get(path) for path in ("/v1/models", "/metrics", "/openapi.json")]
        given = [await get("/v1/models", headers={"Authorization": value})
                 for value in ("Bearer sesam", "sesame", "Basic sesame", "Bearer sesame", "bearer  sesame")]
        return [*closed, *given[:3]], given[3:], [await get("/"), await get("/health")]
    closed, right, opened = served(work, api_key="sesame")
    for reply in closed:
        assert error_of(reply, 401)["code"] == "invalid_api_key"
    assert [reply.json()["data"][0]["id"] for reply in right] == ["random"] * 2
    assert [reply.status_code for reply in opened] == [200, 200]


def test_an_engine_that_fails_is_told_of(served, monkeypatch):
    async def work(server):
        def fails():
            raise ZeroDivisionError("of a test")
        monkeypatch.setattr(server.engine, "step", fails)
        replies = [await server.client.post(COMPLETIONS, json=GOOD), await server.client.post(COMPLETIONS, json=GOOD)]
        return [*replies, await server.client.get("/health")]
    for reply in served(work):
        assert error_of(reply, 500)["message"] == "the engine stopped: of a test"


def test_other_paths_and_methods_have_the_same_shape(served):
    async def work(server):
        send = server.client.request
        return [await send(*asked) for asked in (("GET", "/v2/nothing"), ("GET", COMPLETIONS), ("POST", COMPLETIONS),
                                                 ("HEAD", COMPLETIONS), ("HEAD", "/health"), ("HEAD", "/"))]
    lost, method, empty, *heads = served(work)
    assert error_of(lost, 404) and error_of(method, 405)
    assert error_of(empty)["message"] == "the body is empty; send a JSON object"
    assert [reply.status_code for reply in heads] == [405, 200, 200]  # as GET


VALUES = (None, True, False, 0, -1, 1, 3.5, 1e308, -1e-320, 1e-320, 10**30, "", "x", "\x00", "\u202e<script>",
          "\U0001f600" * 9, [], {}, [[]], [None], [{}], [0], [-1], [[1, 2], ["x"]], {"a": {"b": []}}, ["x"] * 40,
          "many " * 6000, float("nan"), float("inf"), "\ud800", [10**12], "<|im_start|>", [[1]] * 3)
NAMES = ("model", "condition", "n", "stop", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p",
         "seed", "prompt", "messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "echo",
         "tools", "response_format", "__proto__", "", "logit_bias", "best_of", "\ud800")
RAW = (b"", b"{", b"null", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt":' * 2000,
       b"{" + b'"a":1,' * 999 + b"}", b'{"n": ' + b"9" * 5000 + b"}",
       b'{"prompt": "\\ud800"}', b"\x1f\x8b\x08\x00", b'{"temperature": 1e999}')


def hostile(seed):
    """Make a body that hardly anyone would send, as bytes."""
    rng = np.random.default_rng(seed)
    path = (COMPLETIONS, CHAT)[rng.integers(2)]
    if rng.random() < 0.2:
        return path, RAW[rng.integers(len(RAW))]
    body = dict((GOOD, GOOD_CHAT)[path == CHAT if rng.random() < 0.9 else rng.integers(2)])
    for _ in range(rng.integers(1, 4)):
        body[NAMES[rng.integers(len(NAMES))]] = VALUES[rng.integers(len(VALUES))]
    if rng.random() < 0.2 and path == CHAT:
        body["messages"] = [dict(role=VALUES[rng.integers(len(VALUES))], content=VALUES[rng.integers(len(VALUES))])]
    text = json.dumps(body).encode()
    return path, text[:rng.integers(1, len(text))] if rng.random() < 0.1 else text


def test_two_hundred_hostile_requests_change_nothing(served):
    async def work(server):
        before = await server.client.post(COMPLETIONS, json=GOOD)
        statuses = []
        for seed in range(200):
            path, body = hostile(seed)
            reply = await server.client.post(path, content=body, headers={"content-type": "application/json"})
            statuses.append(reply.status_code)
            if reply.status_code != 200:
                assert reply.status_code in (400, 404, 413), (seed, reply.text)
                error_of(reply, reply.status_code)
        after = await server.client.post(COMPLETIONS, json=GOOD)
        assert server.engine.idle and server.engine.cache.free == server.engine.cache.size.blocks
        return before.json()["choices"], after.json()["choices"], statuses
    before, after, statuses = served(work, rows=8)
    assert before == after and {200, 400, 404} <= set(statuses)
    assert statuses.count(400) > 100
