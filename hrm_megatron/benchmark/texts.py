"""Generate examples in many scripts to benchmark reading and tokenizing; deterministic per seed."""
from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

SHARES = {  # of the words
    "latin": 0.52, "code": 0.12, "cyrillic": 0.10, "han": 0.07, "arabic": 0.05, "devanagari": 0.05, "greek": 0.03,
    "thai": 0.02, "hangul": 0.02, "kana": 0.02,
}
LETTERS: dict[str, str | tuple[int, int]] = {  # an alphabet, or first and last code point
    "latin": "etaoinshrdlucmfwypvbgkjqxz\u00e9\u00fc\u00f1\u00e7",
    "code": "etaoinsrd_lucm()[]{}.,:=+-*/<>\"'0123456789",
    "cyrillic": (0x430, 0x44F), "han": (0x4E00, 0x5300), "arabic": (0x627, 0x64A), "devanagari": (0x905, 0x94D),
    "greek": (0x3B1, 0x3C9), "thai": (0xE01, 0xE2E), "hangul": (0xAC00, 0xAE00), "kana": (0x3042, 0x3093),
}
WORDS = 30_000  # per script, with Zipf-distributed frequencies
LONGEST_WORD = {"han": 3, "hangul": 4, "kana": 5}
DECOMPOSED = 0.02  # share of the texts in NFD
LATER = 0.001  # share of the texts with an unassigned code point
MEDIAN_WORDS = 120  # of a text


def write_examples(path: Path, megabytes: float, seed: int = 0) -> int:
    """Write jsonl rows with about `megabytes` of text; return the bytes of their instructions and responses."""
    rng = np.random.default_rng(seed)
    texts = generate(rng, seed)
    text_bytes = 0
    with open(path, "w", encoding="utf-8") as file:
        while text_bytes < megabytes * 1e6:
            instruction, response = next(texts), next(texts)
            text_bytes += len(instruction.encode()) + len(response.encode())
            row = dict(condition=("direct", "cot", "noisy", "synth")[int(rng.integers(4))], instruction=instruction,
                       response=response)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return text_bytes


def generate(rng: np.random.Generator, seed: int) -> Iterator[str]:
    """Yield texts, each in one script with some Latin words."""
    words = {script: _words(script, random.Random(f"{seed}{script}")) for script in SHARES}
    scripts = list(SHARES)
    shares = np.array(list(SHARES.values()))
    while True:
        script = scripts[int(rng.choice(len(scripts), p=shares / shares.sum()))]
        count = int(rng.lognormal(np.log(MEDIAN_WORDS), 0.8)) + 1
        ranks = np.minimum(rng.zipf(1.3, count), WORDS) - 1
        own, latin = words[script], words["latin"]
        foreign = rng.random(count) < 0.05
        pieces = [latin[rank] if other else own[rank] for rank, other in zip(ranks.tolist(), foreign, strict=True)]
        ends = rng.random(count)
        text = "".join(piece + (" " if end < 0.85 else ", " if end < 0.92 else ".\n" if end < 0.97 else f" {rank} ")
                       for piece, end, rank in zip(pieces, ends, ranks, strict=True)).strip()
        if rng.random() < DECOMPOSED:
            text = unicodedata.normalize("NFD", text)
        yield text + " \u0378" if rng.random() < LATER else text


def _words(script: str, rng: random.Random) -> list[str]:
    letters = LETTERS[script]
    alphabet = letters if isinstance(letters, str) else "".join(map(chr, range(letters[0], letters[1] + 1)))
    longest = LONGEST_WORD.get(script, 9)
    sums = [*accumulate(1 / (1 + i) ** 0.5 for i in range(len(alphabet)))]
    return ["".join(rng.choices(alphabet, cum_weights=sums, k=min(longest, 1 + i // 500 + rng.randint(0, 6))))
            for i in range(WORDS)]
