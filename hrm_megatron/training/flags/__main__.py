"""Print docs/flags.md."""
from __future__ import annotations

import sys

from hrm_megatron.parallel.cpu import activate

activate()

from hrm_megatron.training.flags.document import document  # noqa: E402
from hrm_megatron.training.own_flags import full_parser  # noqa: E402

print(document(full_parser()), end="", file=sys.stdout)
