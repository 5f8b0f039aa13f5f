"""Random data of a given shape for benchmarks, in the folder format that `--sampled-data-path` reads."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

PREFIX_TOKENS, RESPONSE_TOKENS = (64, 512), (64, 1024)  # of an example, uniformly distributed
MEAN_TOKENS = sum(PREFIX_TOKENS + RESPONSE_TOKENS) // 2


def write_random_examples(folder: Path, row_tokens: int, rows: int, vocab_size: int, seed: int = 0) -> None:
    """Write enough examples of random tokens to fill `rows` rows; none exceeds half a row."""
    rng = np.random.default_rng(seed)
    shrink = min(1.0, row_tokens / 2 / (PREFIX_TOKENS[1] + RESPONSE_TOKENS[1]))
    count = int(1.2 * rows * row_tokens / (MEAN_TOKENS * shrink)) + 1
    prefixes, responses = (np.maximum(2, (rng.integers(*bounds, count) * shrink).astype(np.int64))
                           for bounds in (PREFIX_TOKENS, RESPONSE_TOKENS))
    starts = np.concatenate(([0], np.cumsum(prefixes + responses)))
    (folder / "epoch_0").mkdir(parents=True)
    np.save(folder / "tokens.npy", rng.integers(1, vocab_size, starts[-1]).astype(np.uint16))
    for name, values in (("inst_start", starts[:-1]), ("inst_len", prefixes), ("resp_start", starts[:-1] + prefixes),
                         ("resp_len", responses)):
        np.save(folder / "epoch_0" / f"{name}.npy", values)
    (folder / "metadata.json").write_text(json.dumps(
        {"tokenizer_info": {"vocab_size": vocab_size}, "max_seq_len": row_tokens + 1}))
