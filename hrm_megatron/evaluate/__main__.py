"""lm-evaluation-harness's own command line, with `--model hrm_megatron` known to it."""
from __future__ import annotations

import sys

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet
from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()
    be_quiet()
    activate()
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"error: lm_eval is not installed ({error}): pip install 'hrm_megatron[lm-eval]'")
    from hrm_megatron.evaluate import harness  # noqa: F401  registers the model

    sys.exit(one_line(cli_evaluate))
