"""Log-likelihoods of given answers: bidirectional prompt as in training, causal answer."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from hrm_megatron.attention.rotary import Rotation
from hrm_megatron.config import ConfigError
from hrm_megatron.generate.decoder import Decoder
from hrm_megatron.layers.functions import gated

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Pair:
    """A prompt and an answer to it; tokens of the answer before `first` are context and are not scored."""

    prompt: Sequence[int]
    answer: Sequence[int]
    first: int = 0

    @property
    def positions(self) -> int:
        """Positions that the model reads; the last token of the answer is predicted, not read."""
        return len(self.prompt) + len(self.answer) - 1


@dataclass(frozen=True)
class Likelihood:
    """Log-probability of an answer (natural logarithm), and whether each of its tokens was the argmax."""

    logprob: float
    greedy: bool


class PairAttention:
    """Attention over packed pairs without a cache: bidirectional prompts, causal answers. In a causal model a pair is a
    prompt of one token and a long answer."""

    def __init__(self, decoder: Decoder, pairs: Sequence[Pair]) -> None:
        a, device = decoder.architecture, decoder.device
        self.heads, self.head_dim = a.num_attention_heads, a.head_dim
        prompts = [1 if a.causal else len(pair.prompt) for pair in pairs]
        self.pairs = [(prompt, pair.positions - prompt) for prompt, pair in zip(prompts, pairs, strict=True)]
        positions = np.concatenate([np.arange(pair.positions) for pair in pairs])
        self.rotation = Rotation.of(torch.as_tensor(positions, device=device)[None], a.head_dim, a.rope_theta)
        self.masks = [torch.ones(answer, prompt + answer, dtype=torch.bool, device=device).tril(prompt)
                      for prompt, answer in self.pairs]

    def __call__(self, slot: int, gqkv: torch.Tensor) -> torch.Tensor:
        """Return the gated attention [n, h] of gqkv [n, 4 h]."""
        gate, *qkv = gqkv.chunk(4, -1)
        query, key, value = (part.view(-1, 1, self.heads, self.head_dim) for part in qkv)
        query, key = self.rotation(query, key)
        lengths = [prompt + answer for prompt, answer in self.pairs]
        rows = zip(*(part.permute(1, 2, 0, 3).split(lengths, 2) for part in (query, key, value)), strict=True)
        found = []
        for (prompt, answer), mask, (q, k, v) in zip(self.pairs, self.masks, rows, strict=True):
            parts = [F.scaled_dot_product_attention(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt])]
            if answer:
                parts.append(F.scaled_dot_product_attention(q[:, :, prompt:], k, v, attn_mask=mask))
            found.append(torch.cat(parts, 2)[0].transpose(0, 1).flatten(1))
        return gated(torch.cat(found), gate)


def likelihoods(decoder: Decoder, pairs: Sequence[Pair], batch_tokens: int = BATCH_TOKENS,
                on_scored: Callable[[int], object] = lambda count: None) -> list[Likelihood]:
    """Return the likelihoods of all pairs in order; `on_scored` is called with the size of each scored batch."""
    for pair in pairs:
        if not pair.prompt or not 0 <= pair.first < len(pair.answer):
            raise ConfigError("empty prompt or answer: give each at least one token")
        if pair.positions > decoder.context_tokens:
            raise ConfigError(f"prompt of {len(pair.prompt)} and answer of {len(pair.answer)} tokens are longer than "
                              f"the model's context of {decoder.context_tokens}; shorten them")
    found: list[Likelihood] = []
    for batch in _batches(pairs, batch_tokens):
        found += _score(decoder, batch)
        on_scored(len(batch))
    return found


def _batches(pairs: Sequence[Pair], batch_tokens: int) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    for pair in pairs:
        if batch and sum(each.positions for each in batch) + pair.positions > batch_tokens:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def _score(decoder: Decoder, pairs: Sequence[Pair]) -> list[Likelihood]:
    tokens = np.concatenate([np.asarray([*pair.prompt, *pair.answer][:-1], dtype=np.int64) for pair in pairs])
    ends = np.cumsum([pair.positions for pair in pairs])
    counts = [len(pair.answer) - pair.first for pair in pairs]
    places = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    logits = decoder.logits_at(tokens, PairAttention(decoder, pairs), places)
    labels = torch.tensor([token for pair in pairs for token in pair.answer[pair.first:]], device=logits.device)
    logprobs = -F.cross_entropy(logits, labels, reduction="none").double()
    likeliest = logits.argmax(-1) == labels
    return [Likelihood(part.sum().item(), bool(greedy.all())) for part, greedy
            in zip(logprobs.split(counts), likeliest.split(counts), strict=True)]


def rolling(prompt: Sequence[int], text: Sequence[int], context_tokens: int) -> list[Pair]:
    """Split a text into windows that fit the context, as pairs that score each of its tokens once.

    The prompt precedes each window. The last window is as long as the others; what it shares with the previous one is
    not scored again.
    """
    window = context_tokens - len(prompt) + 1
    if window < 1:
        raise ConfigError(f"prompt of {len(prompt)} tokens leaves no room in the model's context of {context_tokens}")
    found = []
    for start in range(0, len(text), window):
        end = min(start + window, len(text))
        first = max(0, end - window)
        found.append(Pair(prompt, text[first:end], start - first))
    return found
