"""Answer prompts with an HRM: the whole sequences run at every token, many prompts packed into one row."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hrm_megatron.config import ConfigError
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.model.hrm import HRMModel


@dataclass(frozen=True)
class Sampling:
    """How to choose a token: `temperature` 0 is greedy; `top_p` keeps the likeliest tokens of that mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # NaN too
            raise ConfigError(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be above 0 and at most 1")


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Choose one token per row of logits [n, v]: [n]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    ordered, order = probabilities.sort(-1, descending=True)
    # Nucleus sampling (Holtzman et al., arXiv 1904.09751): drop a token if those before it have the mass already.
    ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
    picked = torch.multinomial(ordered.cpu(), 1, generator=generator).to(order.device)
    return order.gather(-1, picked).squeeze(-1)


def _batches(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Split indices into runs that fit a row; one that is longer than a row has a row to itself."""
    rows: list[list[int]] = [[]]
    used = 0
    for i, length in enumerate(lengths):
        if rows[-1] and used + length > row_tokens:
            rows.append([])
            used = 0
        rows[-1].append(i)
        used += length
    return rows


@torch.no_grad()
def next_token_logits(model: HRMModel, prompts: Sequence[Sequence[int]],
                      answers: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits [n, v] of the token after each (prompt, answer so far); the prompts are prefixes of PrefixLM."""
    pad = [0]  # assemble_row shifts: the last target is only a label
    examples = [(np.asarray(p), np.asarray([*a, *pad])) for p, a in zip(prompts, answers, strict=True)]
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    row = assemble_row(examples, sum(lengths))
    device = model.zL_init.device
    batch = PackedBatch.from_rows({name: tensor[None] for name, tensor in row.items()}).to(device)
    last = torch.tensor(np.cumsum(lengths) - 1, device=device)
    return model.logits_at(model.states(batch), last)


def generate(model: HRMModel, prompts: Sequence[Sequence[int]], stop_token: int, vocab_size: int, max_new_tokens: int,
             sampling: Sampling | None = None, row_tokens: int = 4096,
             on_answer: Callable[[int], object] = lambda count: None) -> list[list[int]]:
    """Continue each prompt until `stop_token` (kept) or `max_new_tokens`; padded vocabulary is never chosen.

    `on_answer` is told how many answers just ended. Needs an HRMModel on one rank.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    answers: list[list[int]] = [[] for _ in prompts]
    open_answers = list(range(len(prompts)))
    model.eval()
    for _ in range(max_new_tokens):
        if not open_answers:
            break
        lengths = [len(prompts[i]) + len(answers[i]) for i in open_answers]
        for run in _batches(lengths, row_tokens):
            chosen = [open_answers[i] for i in run]
            logits = next_token_logits(model, [prompts[i] for i in chosen], [answers[i] for i in chosen])
            tokens = choose(logits[:, :vocab_size], sampling, generator)
            for i, token in zip(chosen, tokens.tolist(), strict=True):
                answers[i].append(token)
        ended = [i for i in open_answers if answers[i][-1] == stop_token]
        on_answer(len(ended))
        open_answers = [i for i in open_answers if answers[i][-1] != stop_token]
    on_answer(len(open_answers))
    return answers
