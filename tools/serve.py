"""Serve a checkpoint of Megatron, transformers (hf) or HRM-Text by OpenAI's API (pip install -e ".[serve]").

    python tools/serve.py --load runs/demo/hf
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "What is 7 + 1?"}], "condition": "direct", "temperature": 0}'
"""
from __future__ import annotations

import argparse
import os
import sys

from hrm_megatron.program import Stopped, listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

from hrm_megatron.config import ConfigError  # noqa: E402
from hrm_megatron.generate.cache import PagedCache, blocks_of  # noqa: E402
from hrm_megatron.generate.engine import Engine  # noqa: E402
from hrm_megatron.generate.flags import add_compute_flags, add_model_flags  # noqa: E402
from hrm_megatron.generate.session import Answering, Session  # noqa: E402

API_KEY = "HRM_MEGATRON_API_KEY"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(p)
    p.add_argument("--model-name", help="what clients call the model (default: the name of the folder)")
    add_compute_flags(p)
    at = p.add_argument_group("address")
    at.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    at.add_argument("--port", type=int, default=8000, help="0: any free one (default: %(default)s)")
    at.add_argument("--api-key", help="what clients must send as 'Authorization: Bearer KEY'; in the environment, as "
                                      f"{API_KEY}, it is not seen by all who list processes")
    limits = p.add_argument_group("limits")
    limits.add_argument("--batch-size", type=int, default=8, help="answers at once (default: %(default)s)")
    limits.add_argument("--cache-tokens", type=int, metavar="N",
                        help="positions of the key-value cache (default: the context for each of --batch-size)")
    limits.add_argument("--max-prompts", type=int, default=64, metavar="N",
                        help="prompts that are answered or wait; more are refused with 429 (default: %(default)s)")
    limits.add_argument("--max-body-bytes", type=int, default=4 << 20, metavar="N",
                        help="of a request; more are refused with 413 (default: %(default)s)")
    limits.add_argument("--timeout-seconds", type=float, default=600.0, metavar="S",
                        help="for the answers of a request, waiting included (default: %(default)s)")
    return p


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check_flags(args: argparse.Namespace) -> None:
    for name in ("batch_size", "max_prompts", "max_body_bytes", "cache_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 < args.timeout_seconds < float("inf"):  # NaN too
        raise ConfigError(f"--timeout-seconds {args.timeout_seconds}: must be a positive number")


def chosen_api_key(args: argparse.Namespace) -> str | None:
    """Return the key that clients must send, None if they need none."""
    given = {"--api-key": args.api_key, API_KEY: os.environ.get(API_KEY)}
    keys = {name: key for name, key in given.items() if key is not None}
    if len(keys) > 1:
        raise ConfigError(f"there are an --api-key and {API_KEY}; leave one out")
    for name, key in keys.items():
        if not (key.isascii() and key.strip() == key != ""):
            raise ConfigError(f"{name}: must be ASCII, not empty and without spaces around it")
    return next(iter(keys.values()), None)


def serve(args: argparse.Namespace) -> None:
    check_flags(args)
    api_key = chosen_api_key(args)
    try:
        import fastapi
        import uvicorn
    except ImportError as error:
        raise ConfigError(f'{error.name} is missing, which serving needs; pip install -e ".[serve]"') from error
    del fastapi, uvicorn
    from hrm_megatron.serve.app import Service, build_app
    from hrm_megatron.serve.guard import Limits
    from hrm_megatron.serve.live_engine import LiveEngine
    from hrm_megatron.serve.process import bind, is_loopback, url_of
    from hrm_megatron.serve.process import listen as listen_at
    from hrm_megatron.serve.process import serve as serve_at

    place = bind(args.host, args.port)
    answering = Answering(h_cycles=args.h_cycles, l_cycles=args.l_cycles, exit_threshold=args.exit_threshold,
                          dtype=args.dtype)
    session = Session(args.load, answering, args.tokenizer_model, args.weights, args.ckpt_step, args.verify_checkpoint)
    if session.remark:
        say(session.remark)
    decoder = session.decoder
    # One more block for each: a prompt's last, partly filled block is copied.
    blocks = blocks_of(args.cache_tokens) + 1 if args.cache_tokens else \
        args.batch_size * (blocks_of(decoder.context_tokens) + 1)
    size = decoder.cache_size(blocks)
    say(size.check(decoder.device, "lower --batch-size or --cache-tokens"))
    engine = Engine(decoder, PagedCache(size, decoder.device), args.batch_size, session.text)
    service = Service(session, LiveEngine(engine, args.max_prompts), args.model_name or args.load.resolve().name,
                      Limits(args.max_body_bytes, args.timeout_seconds))
    guard = build_app(service, api_key)
    if not is_loopback(args.host) and api_key is None:
        say(f"warning: --host {args.host} lets other machines in, and there is no --api-key, nor {API_KEY}")
    listen_at(place)
    say(f"serving {service.model} at {url_of(place)}")
    if cut := serve_at(guard, place):
        say(f"stopped by a second signal, {cut.signal.name}; requests without their answer: {cut.requests}")
        raise Stopped(128 + cut.signal)
    say("all requests answered; ended")


def main() -> int:
    args = parser().parse_args()
    return one_line(lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())
