"""One checkpoint of a random model for all tests of the server, in this process and in one of its own."""
from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from tests.random_checkpoint import TOKENIZER, write_random_checkpoint

CONTEXT = 4096  # room for answers that no test waits for
STD = 24 ** -0.5  # of initial weights, with which tests/generate hold rounding


@pytest.fixture(scope="session")
def checkpoints(single_rank, tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("served") / "random", CONTEXT, STD)


@pytest.fixture(scope="session")
def session(checkpoints):
    from hrm_megatron.generate.session import Answering, Session

    return Session(checkpoints, Answering(), TOKENIZER)


@pytest.fixture(scope="session")
def answered(checkpoints):
    """What tools/generate.py answers: the transcripts of each question."""
    from hrm_megatron.generate.questions import Question
    from hrm_megatron.generate.sampling import Sampling
    from hrm_megatron.generate.session import Answering, Session

    def answer(questions, condition="direct", sampling=(0.0,), rows=1, **settings):
        one = Session(checkpoints, Answering(sampling=Sampling(*sampling), **settings), TOKENIZER)
        asked = [Question("test", condition, question) for question in questions]
        return list(one.answer(one.requests(asked), rows, lambda line: None))
    return answer


@pytest.fixture
def served(session):
    """Serve in this process: `served(limits, ...)` gives `post`, `get` and the parts, all for one event loop."""
    import httpx

    from hrm_megatron.generate.cache import PagedCache
    from hrm_megatron.generate.engine import Engine
    from hrm_megatron.serve.app import Service, build_app
    from hrm_megatron.serve.guard import Limits
    from hrm_megatron.serve.live_engine import LiveEngine

    def run(work, rows=4, blocks=4 * 257, max_prompts=16, api_key=None, **limits):
        engine = Engine(session.decoder, PagedCache(session.decoder.cache_size(blocks)), rows, session.text)

        async def serving():
            live = LiveEngine(engine, max_prompts)
            guard = build_app(Service(session, live, "random", Limits(**limits)), api_key)
            transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
                try:
                    return await work(SimpleNamespace(client=client, live=live, guard=guard, engine=engine))
                finally:
                    await asyncio.to_thread(live.close)
        return asyncio.run(serving())
    return run


@pytest.fixture
def ask(served):
    """Send one body to a server of its own, and return its reply."""
    def send(path, body, **options):
        async def work(server):
            kind = dict(json=body) if isinstance(body, dict) else dict(content=body)
            return await server.client.post(path, headers={"content-type": "application/json"}, **kind)
        return served(work, **options)
    return send
