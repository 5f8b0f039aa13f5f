"""Metrics of the server in Prometheus' text format."""
from __future__ import annotations

from collections.abc import Mapping

from hrm_megatron.serve.live_engine import LiveEngine


def metrics_text(live: LiveEngine, statuses: Mapping[tuple[str, int], int]) -> str:
    """Return the current values. The engine is running, so they may differ by a token."""
    engine = live.engine
    values = {
        ("hrm_answers_running", "gauge", "Answers that get a token per step."): len(engine.running),
        ("hrm_prompts_open", "gauge", "Prompts that are being answered or wait."): live.prompts,
        ("hrm_cache_blocks", "gauge", "Blocks of the key-value cache."): engine.cache.size.blocks,
        ("hrm_cache_blocks_free", "gauge", "Those that no answer holds."): engine.cache.free,
        ("hrm_completion_tokens_total", "counter", "Tokens that were chosen."): live.completion_tokens,
    }
    lines = []
    for (name, kind, what), value in values.items():
        lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}", f"{name} {value}"]
    lines += ["# HELP hrm_requests_total Requests that have ended; 499: the client went away.",
              "# TYPE hrm_requests_total counter"]
    lines += [f'hrm_requests_total{{path="{path}",status="{status}"}} {count}'
              for (path, status), count in sorted(statuses.items())]
    return "\n".join(lines) + "\n"
