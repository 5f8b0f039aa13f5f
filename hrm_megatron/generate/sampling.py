"""Sampling of the next token, and a random generator per answer."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hrm_megatron.config import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How to choose a token: `temperature` 0 is greedy.

    Applied in transformers' order: temperature; `top_k` keeps that many of the likeliest (0: all); `top_p` the smallest
    set of likeliest tokens with that mass; `min_p` those at least that likely relative to the likeliest.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1234
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):  # NaN too
            raise ConfigError(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: must be 0 (all tokens) or positive")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p}: must be between 0 and 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k or self.min_p):
            raise ConfigError("top_p, top_k and min_p are without effect at temperature=0 (greedy); give a temperature "
                              "too, or leave them out")


def random_numbers(seed: int, stream: int, sample: int) -> np.random.Generator:
    """Return the random generator of sample `sample` of the prompt `stream`, independent of the batch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, sample))))


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the probabilities, up to a factor, of the tokens that may be chosen, and their ids (None: all [v]).

    If there are ids, the likeliest comes first.
    """
    shifted = logits.double()
    shifted = shifted - shifted.max()  # so that a temperature near 0 overflows to -inf only
    probabilities = (shifted / sampling.temperature).softmax(-1)
    if sampling.top_p == 1 and not sampling.top_k and not sampling.min_p:
        return probabilities, None
    if sampling.top_k:
        kept, ids = probabilities.topk(min(sampling.top_k, len(probabilities)))
        kept = kept / kept.sum()
    else:
        # Tokens less likely than (1 - top_p) / v are outside the nucleus even all together: sort only the others.
        floor = max((1 - sampling.top_p) / len(probabilities), sampling.min_p * probabilities.max().item())
        ids = (probabilities >= floor).nonzero().squeeze(1)
        kept, order = probabilities[ids].sort(descending=True, stable=True)
        ids = ids[order]
    # Nucleus sampling (Holtzman et al., arXiv 1904.09751): drop a token if those before it already have the mass.
    inside = (kept.cumsum(-1) - kept < sampling.top_p) & (kept >= sampling.min_p * kept[0])
    return kept[inside], ids[inside]


def choose(logits: torch.Tensor, sampling: Sampling, uniform: float) -> int:
    """Choose a token from logits [v] and a uniform number in [0, 1), which greedy choice ignores."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, ids = candidates(logits, sampling)
    ends = probabilities.cumsum(-1)
    picked = int(torch.searchsorted(ends, uniform * ends[-1], right=True).clamp(max=len(ends) - 1))
    return picked if ids is None else int(ids[picked])
