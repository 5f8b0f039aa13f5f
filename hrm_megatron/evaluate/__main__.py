"""The command line of lm-evaluation-harness with `--model hrm_megatron` registered."""
from __future__ import annotations

import sys
from collections.abc import Callable
from traceback import walk_tb

from hrm_megatron.config import ConfigError
from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet
from hrm_megatron.program import listen, one_line


def refusing(work: Callable[[], object]) -> Callable[[], object]:
    """Return `work` with ValueErrors that the harness itself raises, e.g. for an unknown task, turned into
    ConfigErrors."""
    def call() -> None:
        try:
            work()
        except ValueError as error:
            *_, (frame, _) = walk_tb(error.__traceback__)
            if not frame.f_globals.get("__name__", "").startswith("lm_eval."):
                raise
            raise ConfigError(" ".join(str(error).split())) from error
    return call


if __name__ == "__main__":
    listen()
    be_quiet()
    activate()
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"error: lm_eval is not installed ({error}): pip install 'hrm_megatron[lm-eval]'")
    from hrm_megatron.evaluate import harness  # noqa: F401  registers the model

    sys.exit(one_line(refusing(cli_evaluate)))
