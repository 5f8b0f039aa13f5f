"""tools/serve.py as a process: clients of other makers, a browser, clients that go away, and its end."""
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn")

from hrm_megatron.config import ConfigError
from hrm_megatron.serve.guard import Guard, Limits
from tests.random_checkpoint import TOKENIZER
from tests.tools import load_tool

ROOT = Path(__file__).parents[2]
QUESTION = "Name the tens digit of 7543."  # greedy, the random model's answer has over a thousand tokens
LONG_TOKENS = 1000
MARKUP = "<img src=x onerror=\"document.title='run'\">"

# Also where the tests run under nohup, or in the background: what is ignored there, a program leaves ignored.
HEARS_SIGNALS = ("import os, signal, sys\n"
                 "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_DFL)\n"
                 "os.execv(sys.argv[1], sys.argv[1:])")


@contextlib.contextmanager
def serving(checkpoints, folder):
    """The server at a free port, which answers one at a time."""
    log = folder / "log"
    with log.open("w") as file:
        started = subprocess.Popen([sys.executable, "-c", HEARS_SIGNALS, sys.executable, ROOT / "tools" / "serve.py",
                                    "--load", checkpoints,
                                    "--tokenizer-model", TOKENIZER, "--port", "0", "--batch-size", "1"],
                                   cwd=ROOT, stderr=file, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        while not (found := re.search(r"^serving random at http://127\.0\.0\.1:(\d+)$", log.read_text(), re.M)):
            with pytest.raises(subprocess.TimeoutExpired):
                started.wait(0.2)
        yield SimpleNamespace(port=int(found[1]), url=f"http://127.0.0.1:{found[1]}", popen=started, log=log)
    finally:
        started.kill()
        started.wait()


@pytest.fixture(scope="module")
def process(checkpoints, tmp_path_factory):
    with serving(checkpoints, tmp_path_factory.mktemp("server")) as process:
        yield process


def begin(process, **body):
    """Send a completion and return its connection and reply, of which only the head is read."""
    connection = http.client.HTTPConnection("127.0.0.1", process.port)
    connection.request("POST", "/v1/completions", json.dumps(dict(prompt=QUESTION, temperature=0, **body)),
                       {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def metrics(process):
    connection = http.client.HTTPConnection("127.0.0.1", process.port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_an_address_that_another_takes_meanwhile_is_named():
    """Two servers that are started at once both get the address, until one of them listens."""
    from hrm_megatron.serve.process import bind, listen

    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", first.getsockname()[1]) as second:
        listen(first)
        with pytest.raises(ConfigError, match=r"^--port \d+: 127.0.0.1 was taken while the model was read .*; choose"):
            listen(second)


def test_an_idle_connection_is_kept_longer_than_clients_keep_it(monkeypatch):
    """A client that sends into one which the server has just closed gets an error."""
    import httpx

    from hrm_megatron.serve import process

    configs = []
    monkeypatch.setattr(process._Server, "run", lambda server, sockets: configs.append(server.config))
    process.serve(Guard(None, Limits()), None)
    aiohttp, nginx = 15, 60
    assert configs[0].timeout_keep_alive > max(httpx.Limits().keepalive_expiry, aiohttp, nginx)


def test_a_client_that_goes_away_frees_its_place(process):
    """One place alone: what is asked after a client has left is answered before its answer could have ended."""
    first = metrics(process)
    before, gone = first["hrm_completion_tokens_total"], 'hrm_requests_total{path="/v1/completions",status="499"}'
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", process.port)
        connection.request("POST", "/v1/completions", json.dumps(dict(
            prompt=QUESTION, temperature=0, max_tokens=2000, stream=stream)), {"Content-Type": "application/json"})
        if stream:
            reply = connection.getresponse()
            assert reply.readline().startswith(b"data: {")
            reply.close()
        connection.close()
        _, reply = begin(process, max_tokens=3)
        assert json.loads(reply.read())["usage"]["completion_tokens"] == 3
    after = metrics(process)
    assert after["hrm_completion_tokens_total"] - before < LONG_TOKENS
    assert after[gone] - first.get(gone, 0) == 2
    assert after["hrm_cache_blocks_free"] == after["hrm_cache_blocks"] and after["hrm_answers_running"] == 0


def test_openais_client_works(process, answered):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0)
    [[sample]] = answered([QUESTION], "cot", max_new_tokens=12)
    asked = dict(model=client.models.list().data[0].id, max_tokens=12, temperature=0, extra_body=dict(condition="cot"))
    messages = [dict(role="user", content=QUESTION)]
    whole = client.chat.completions.create(messages=messages, **asked)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (sample.text, sample.finish)
    chunks = [*client.chat.completions.create(messages=messages, stream=True, stream_options=dict(include_usage=True),
                                              **asked)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == sample.text
    assert chunks[-1].usage.completion_tokens == len(sample.tokens)
    done = client.completions.create(prompt=QUESTION, logprobs=2, **asked)
    assert done.choices[0].text == sample.text and len(done.choices[0].logprobs.token_logprobs) == len(sample.tokens)
    with pytest.raises(openai.BadRequestError, match="frequency_penalty: is without effect here"):
        client.chat.completions.create(messages=messages, frequency_penalty=1, **asked)
    with pytest.raises(openai.NotFoundError, match="this is 'random'"):
        client.chat.completions.create(messages=messages, **{**asked, "model": "other"})


def browser():
    """A headless Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_the_page_answers_in_a_browser(process, answered, tmp_path):
    """Ask in the page as a person does, with markup in the prompt, and read what it shows."""
    if not browser():
        pytest.skip("no Chromium on this machine")
    from tests.serve.devtools import Page

    [[sample]] = answered([MARKUP], "direct,cot", max_new_tokens=8)
    with Page(browser(), process.url, tmp_path) as page:
        page.until("document.querySelectorAll('#tags input').length === 4")
        assert page.value("document.getElementById('model').textContent") == "random"
        page.value("document.querySelector('#tags input[value=cot]').click()")
        page.value(f"document.getElementById('prompt').value = {json.dumps(MARKUP)}")
        page.value("document.getElementById('tokens').value = 8")
        page.value("document.getElementById('ask').click()")
        page.until("document.getElementById('note').textContent !== ''")
        assert page.value("document.getElementById('note').textContent") == f"finished: {sample.finish}"
        assert page.value("document.getElementById('answer').textContent") == sample.text
        page.value(f"""window.fetch = async () => new Response('data: ' + JSON.stringify(
            {{choices: [{{delta: {{content: {json.dumps(MARKUP)}}}, finish_reason: 'stop'}}]}}) + '\\n\\n')""")
        page.value("document.getElementById('ask').click()")
        page.until("document.getElementById('note').textContent === 'finished: stop'")
        assert page.value("document.getElementById('answer').textContent") == MARKUP  # text, and no element
        assert page.value("document.getElementById('answer').children.length") == 0
        assert page.value("document.title") == "hrm_megatron"


def test_the_page_tells_of_a_refusal(process, tmp_path):
    if not browser():
        pytest.skip("no Chromium on this machine")
    from tests.serve.devtools import Page

    with Page(browser(), process.url, tmp_path) as page:
        page.until("document.querySelectorAll('#tags input').length === 4")
        page.value("document.getElementById('ask').click()")
        page.until("document.getElementById('note').className === 'bad'")
        assert "empty" in page.value("document.getElementById('note').textContent")
        assert page.value("performance.getEntriesByType('resource').filter(e => !e.name.startsWith(location.origin) "
                          "&& !e.name.startsWith('data:')).length") == 0


def test_a_signal_lets_answers_end_and_refuses_new_ones(process):
    """The last test: it ends the process, which an idle connection does not hold up."""
    idle = http.client.HTTPConnection("127.0.0.1", process.port)
    idle.request("GET", "/health")
    assert idle.getresponse().read() and idle.sock
    _, reply = begin(process, max_tokens=LONG_TOKENS, stream=True)
    assert reply.readline().startswith(b"data: {")
    process.popen.send_signal(signal.SIGTERM)
    while "SIGTERM: 1 requests in flight" not in process.log.read_text():
        assert process.popen.poll() is None
    _, refused = begin(process, max_tokens=1)
    assert refused.status == 503 and "the server is ending" in json.loads(refused.read())["error"]["message"]
    events = [line for line in reply.read().decode().split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
    assert process.popen.wait() == 0 and idle.sock.recv(1) == b""
    said = process.log.read_text()
    assert said.endswith("all requests answered; ended\n") and "timeout graceful shutdown exceeded" not in said


def test_a_second_signal_ends_at_once(checkpoints, tmp_path):
    """Whichever they are, with a client that reads a stream and one that waits for its place."""
    with serving(checkpoints, tmp_path) as process:
        _, reply = begin(process, max_tokens=3000, stream=True)
        assert reply.readline().startswith(b"data: {")
        waiting = http.client.HTTPConnection("127.0.0.1", process.port)
        waiting.request("POST", "/v1/completions", json.dumps(dict(prompt=QUESTION, max_tokens=3000)),
                        {"Content-Type": "application/json"})
        while metrics(process)["hrm_prompts_open"] < 2:
            assert process.popen.poll() is None
        process.popen.send_signal(signal.SIGHUP)
        while "SIGHUP: 2 requests in flight" not in process.log.read_text():
            assert process.popen.poll() is None
        process.popen.send_signal(signal.SIGTERM)
        with pytest.raises(http.client.IncompleteRead):
            reply.read()
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            waiting.getresponse()
        assert process.popen.wait() == 128 + signal.SIGTERM
    said = process.log.read_text()
    assert said.endswith("stopped by a second signal, SIGTERM; requests without their answer: 2\n")
    assert "Traceback" not in said


@pytest.fixture
def tool(single_rank):
    return load_tool("serve")


@pytest.mark.parametrize("environment, flags, key", [
    (None, [], None), (None, ["--api-key", "sesame"], "sesame"), ("open sesame", [], "open sesame"),
    ("", [], "HRM_MEGATRON_API_KEY: must be ASCII, not empty"), (" s", [], "HRM_MEGATRON_API_KEY: must be ASCII"),
    ("a", ["--api-key", "a"], "there are an --api-key and HRM_MEGATRON_API_KEY; leave one out"),
])
def test_a_key_is_taken_from_the_environment_too(tool, monkeypatch, tmp_path, environment, flags, key):
    monkeypatch.delenv("HRM_MEGATRON_API_KEY", raising=False)
    if environment is not None:
        monkeypatch.setenv("HRM_MEGATRON_API_KEY", environment)
    args = tool.parser().parse_args(["--load", str(tmp_path), *flags])
    if key and key.startswith(("HRM_", "there")):
        with pytest.raises(ConfigError, match=key):
            tool.chosen_api_key(args)
    else:
        assert tool.chosen_api_key(args) == key


@pytest.mark.parametrize(("flags", "message"), [
    (["--port", "99999"], "--port 99999: must be from 0"),
    (["--host", "no.such.host.invalid"], "cannot listen there"),
    (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    (["--timeout-seconds", "nan"], "--timeout-seconds nan: must be a positive number"),
    (["--api-key", ""], "--api-key: must be ASCII"),
])
def test_bad_flags_are_one_line(tool, monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--load", str(tmp_path), *flags])
    assert tool.main() == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_a_cache_that_does_not_fit_is_told_by_flags_of_the_server(tool, checkpoints, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--load", str(checkpoints), "--tokenizer-model", str(TOKENIZER),
                                      "--port", "0", "--batch-size", "10000000"])
    assert tool.main() == 1
    assert "else; lower --batch-size or --cache-tokens, or take --dtype bfloat16" in capsys.readouterr().err
