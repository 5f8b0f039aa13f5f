"""Answer prompts with an HRMModel of the training code, and the reference that generation is tested against."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.generate.cache import PagedCache
from hrm_megatron.generate.decoder import Decoder
from hrm_megatron.generate.engine import Engine, Progress, Request, blocks_needed
from hrm_megatron.generate.sampling import Sampling
from hrm_megatron.generate.weights import take_weights
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.model.lora import merged_weights

MAX_ROWS = 32


@torch.no_grad()
def next_token_logits(model: HRMModel, prompts: Sequence[Sequence[int]],
                      answers: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits [n, v] of the token after each (prompt, answer so far), by the training code, without a cache.

    The prompts are prefixes of the PrefixLM.
    """
    pad = [0]  # assemble_row shifts: the last target is a label only
    examples = [(np.asarray(p), np.asarray([*a, *pad])) for p, a in zip(prompts, answers, strict=True)]
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    row = assemble_row(examples, sum(lengths), causal=model.config.arch.causal)
    device = model.output_layer.weight.device
    batch = PackedBatch.from_rows({name: tensor[None] for name, tensor in row.items()}).to(device)
    last = torch.tensor(np.cumsum(lengths) - 1, device=device)
    return model.logits_at(model.states(batch), last)


def decoder_of(model: HRMModel, context_tokens: int, vocab_size: int | None = None) -> Decoder:
    """Return a decoder with the weights of a model on one rank, adapters merged."""
    tensors, parameter = merged_weights(model), model.output_layer.weight
    return Decoder(take_weights(model.config.arch, tensors.items(), vocab_size, parameter.dtype, parameter.device),
                   context_tokens)


def generate(model: HRMModel, prompts: Sequence[Sequence[int]], stop_token: int, vocab_size: int, max_new_tokens: int,
             sampling: Sampling | None = None, max_rows: int = MAX_ROWS,
             on_answer: Callable[[int], object] = lambda count: None) -> list[list[int]]:
    """Continue each prompt until `stop_token` (kept) or `max_new_tokens`; tokens of the vocabulary padding are never
    chosen.

    `on_answer` is called with 1 for each answer that ends. Needs an HRMModel on one rank.
    """
    if not prompts:
        return []
    decoder = decoder_of(model, max(map(len, prompts)) + max_new_tokens, vocab_size)
    requests = [Request(prompt, max_new_tokens, sampling or Sampling(), frozenset({stop_token}), stream=stream)
                for stream, prompt in enumerate(prompts)]
    size = decoder.cache_size(sum(sorted(blocks_needed(len(prompt), max_new_tokens) for prompt in prompts)[-max_rows:]))
    size.check(decoder.device)
    engine = Engine(decoder, PagedCache(size, decoder.device), max_rows)

    def count(progress: Progress) -> None:
        on_answer(progress.transcript.finish is not None)
    return [samples[0].tokens for samples in engine.answer(requests, count)]
