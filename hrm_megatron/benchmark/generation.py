"""Time generation against transformers' HrmText, alternating, with the same weights, prompts, process and threads."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import HrmTextConfig, HrmTextForCausalLM

from hrm_megatron.benchmark.peak import matmul_flops_per_second
from hrm_megatron.config import Architecture, ffn_hidden_size
from hrm_megatron.convert.table import table
from hrm_megatron.generate.cache import PagedCache
from hrm_megatron.generate.decoder import Decoder
from hrm_megatron.generate.engine import Engine, Request, blocks_needed
from hrm_megatron.generate.weights import Weights, take_weights

ARCHITECTURES = {
    "demo": Architecture(2, 128, 4, 256, 400),  # as examples/demo trains it
    "100M": Architecture(6, 768, 12, ffn_hidden_size(768), 8192),
}
ROUNDS = 3  # number of batches with answers of mixed length
COPY_BYTES = 1 << 28  # far larger than any CPU cache
MATMUL_SIZE = 1024


@dataclass(frozen=True)
class Work:
    """Prompts, number of tokens of each answer, and batch size."""

    prompts: list[list[int]]
    new_tokens: list[int]
    rows: int

    @property
    def longest(self) -> int:
        """Positions of the longest prompt plus the longest answer."""
        return max(map(len, self.prompts)) + max(self.new_tokens)

    def batches(self) -> list[Work]:
        """Return the batches, in the order of the prompts."""
        return [Work(self.prompts[start:start + self.rows], self.new_tokens[start:start + self.rows], self.rows)
                for start in range(0, len(self.prompts), self.rows)]


@dataclass(frozen=True)
class Timed:
    """Seconds until all prompts have their first token (0: not measured, with several batches), seconds in total, and
    the generated tokens."""

    first_seconds: float
    seconds: float
    tokens: list[list[int]]


def random_tensors(architecture: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights of unit gain, with Megatron's names and layout."""
    generator = torch.Generator().manual_seed(seed)
    return {entry.megatron: torch.randn(entry.shape, generator=generator) * (entry.shape[-1] ** -0.5 if entry.trained
            else 1.0) for entry in table(architecture)}


def random_work(rows: int, longest_prompt: int, new_tokens: int, shortest: int | None, vocab_size: int,
                seed: int = 0) -> Work:
    """Return random prompts of `longest_prompt` / 2 to `longest_prompt` tokens: one batch with answers of `new_tokens`,
    or with `shortest` ROUNDS batches with answers of `shortest` to `new_tokens`, uniformly distributed."""
    rng, count = np.random.default_rng(seed), rows if shortest is None else ROUNDS * rows
    prompts = [rng.integers(14, vocab_size, length).tolist()
               for length in rng.integers(longest_prompt // 2, longest_prompt + 1, count)]
    lengths = [new_tokens] * count if shortest is None else rng.integers(shortest, new_tokens + 1, count).tolist()
    return Work(prompts, lengths, rows)


def our_generation(weights: Weights, work: Work, clock: Callable[[], float]) -> Callable[[], Timed]:
    """Return a function that generates greedily with the engine."""
    decoder, asked = Decoder(weights, work.longest), [*zip(work.prompts, work.new_tokens, strict=True)]
    needed = sorted(blocks_needed(len(prompt), new_tokens) for prompt, new_tokens in asked)
    cache = PagedCache(decoder.cache_size(sum(needed[-work.rows:])))

    def run() -> Timed:
        engine = Engine(decoder, cache, work.rows)
        start, begun, first_seconds = clock(), set(), 0.0

        def note(progress: Any) -> None:
            nonlocal first_seconds
            begun.add(progress.request)
            if not first_seconds and len(begun) == len(asked) == work.rows:
                first_seconds = clock() - start
        found = engine.answer([Request(prompt, new_tokens) for prompt, new_tokens in asked], note)
        return Timed(first_seconds, clock() - start, [samples[0].tokens for samples in found])
    return run


def transformers_model(architecture: Architecture, tensors: dict[str, torch.Tensor],
                       dtype: torch.dtype) -> HrmTextForCausalLM:
    """Return transformers' model with the same weights."""
    a = architecture
    model = HrmTextForCausalLM(HrmTextConfig(
        vocab_size=a.padded_vocab_size, hidden_size=a.hidden_size, intermediate_size=a.ffn_hidden_size,
        num_hidden_layers=a.num_layers, num_attention_heads=a.num_attention_heads, head_dim=a.head_dim,
        H_cycles=a.h_cycles, L_cycles=a.l_cycles, initializer_range=a.input_std, pad_token_id=0)).eval()
    split = {"attn.gqkv_proj": ("gate_proj", "q_proj", "k_proj", "v_proj"),
             "mlp.gate_up_proj": ("gate_proj", "up_proj")}
    state: dict[str, torch.Tensor] = {}
    for entry in table(a):
        tensor, name = entry.from_megatron(tensors[entry.megatron]), entry.hf
        fused = next((fused for fused in split if fused in name), None)
        for part, piece in zip(split.get(fused or "", ("",)), tensor.chunk(len(split.get(fused or "", ("",)))),
                               strict=True):
            renamed = name.replace(fused, f"{fused.split('.')[0]}.{part}") if fused else name
            state[renamed.replace(".attn.", ".self_attn.")] = piece
    missing, left_over = model.load_state_dict(state, strict=False)
    assert not left_over and not [name for name in missing if "inv_freq" not in name]
    return model.to(dtype)


def transformers_generation(model: HrmTextForCausalLM, work: Work, vocab_size: int,
                            clock: Callable[[], float]) -> Callable[[], Timed]:
    """Return a function that generates greedily with transformers: batch by batch, left-padded, prompts marked as
    prefixes. A batch ends with its longest answer; the others are cut to the tokens asked for."""
    padding = [*range(vocab_size, model.config.vocab_size)] or None

    def answers(part: Work, new_tokens: int) -> list[list[int]]:
        width = max(map(len, part.prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in part.prompts])
        live = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part.prompts])
        out = model.generate(input_ids=ids, attention_mask=live, token_type_ids=live, max_new_tokens=new_tokens,
                             do_sample=False, eos_token_id=None, suppress_tokens=padding)
        return [row[:count] for row, count in zip(out[:, width:].tolist(), part.new_tokens, strict=True)]

    def run() -> Timed:
        parts = work.batches()
        start = clock()
        found = [answer for part in parts for answer in answers(part, max(part.new_tokens))]
        seconds, start = clock() - start, clock()
        if len(parts) > 1:
            return Timed(0.0, seconds, found)
        answers(work, 1)  # since transformers can stream only a single prompt
        return Timed(clock() - start, seconds, found)
    return run


def copied_bytes_per_second() -> float:
    """Return the memory bandwidth on torch's threads: bytes/s read and written by a copy, best of five."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * COPY_BYTES / best


def fastest_seconds(weights: Weights, prompts: Sequence[Sequence[int]], new_tokens: int, flops_per_second: float,
                    bytes_per_second: float) -> float:
    """Return a lower bound of the seconds for these answers, from matmuls and memory traffic only.

    A token costs 2 FLOPs per weight and tick that uses it. Each token after the first takes the longer of reading the
    weights and multiplying with them, plus reading its cache: keys and values of its positions so far.
    """
    a, element = weights.architecture, weights.embedding.element_size()
    head, read, steps = weights.head.nbytes / element, sum(map(len, prompts)), new_tokens - 1
    token = weights.tick_bytes / element  # weights per token of an answer, over all ticks
    position_bytes = a.h_cycles * (a.l_cycles + 1) * a.num_layers * 2 * a.num_attention_heads * a.head_dim * element
    positions = steps * read + len(prompts) * steps * (steps + 1) // 2
    prefill = 2 * (read * (token - head) + len(prompts) * head) / flops_per_second
    step = max(2 * len(prompts) * token / flops_per_second, weights.tick_bytes / bytes_per_second)
    return prefill + steps * step + positions * position_bytes / bytes_per_second


def compare_generation(names: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], prompt_tokens: int,
                       new_tokens: int, shortest: int | None, pairs: int, cpu_time: bool) -> None:
    """Print tokens/s and time to first token of both (medians), and the median over the pairs of their time / ours."""
    clock = time.process_time if cpu_time else time.perf_counter
    bandwidth = copied_bytes_per_second()
    answers = (f"{new_tokens} new ones each" if shortest is None else
               f"{shortest} to {new_tokens} new ones, {ROUNDS} prompts for each place in a batch")
    print(f"greedy, prompts of {prompt_tokens // 2} to {prompt_tokens} tokens, {answers}, {pairs} "
          f"pair(s), {torch.get_num_threads()} thread(s), {'CPU time of the process' if cpu_time else 'wall time'}; "
          f"memory copies {bandwidth / 1e9:.1f} GB/s")
    for name in names:
        architecture = ARCHITECTURES[name]
        tensors = random_tensors(architecture)
        for dtype in dtypes:
            rate = matmul_flops_per_second(getattr(torch, dtype), MATMUL_SIZE)
            weights = take_weights(architecture, tensors.items(), dtype=getattr(torch, dtype))
            model = transformers_model(architecture, tensors, getattr(torch, dtype))
            for rows in batches:
                work = random_work(rows, prompt_tokens, new_tokens, shortest, architecture.vocab_size)
                runs = (our_generation(weights, work, clock),
                        transformers_generation(model, work, architecture.vocab_size, clock))
                for run in runs:
                    run()  # warms up
                timed = [tuple(run() for run in runs) for _ in range(pairs)]
                said = _ratio(f"{name} {dtype} batch {rows}", timed, sum(work.new_tokens))
                if shortest is None:
                    fastest = fastest_seconds(weights, work.prompts, new_tokens, rate, bandwidth)
                    said += _bounds(timed, new_tokens * weights.tick_bytes, len(work.prompts) * new_tokens / fastest)
                print(f"{said}; same answers {_same(timed)} of {len(work.prompts)}", flush=True)


def _medians(timed: Sequence[tuple[Timed, ...]], value: Callable[[Timed], float]) -> tuple[float, ...]:
    """Return the medians over the pairs, ours and theirs."""
    return tuple(statistics.median(value(pair[side]) for pair in timed) for side in (0, 1))


def _ratio(what: str, timed: Sequence[tuple[Timed, ...]], tokens: int) -> str:
    ours, theirs = _medians(timed, lambda each: tokens / each.seconds)
    ratio = statistics.median(pair[1].seconds / pair[0].seconds for pair in timed)
    return f"{what:24} {ours:8.1f} tokens/s against {theirs:8.1f}: {ratio:5.2f} times"


def _bounds(timed: Sequence[tuple[Timed, ...]], weight_bytes: int, most: float) -> str:
    first, their_first = _medians(timed, lambda each: each.first_seconds)
    seconds, _ = _medians(timed, lambda each: each.seconds)
    return (f"; first token {first:.3f} s against {their_first:.3f}; {weight_bytes / seconds / 1e9:.1f} GB/s "
            f"of weights read; matmuls and memory alone {most:.1f} tokens/s")


def _same(timed: Sequence[tuple[Timed, ...]]) -> int:
    return sum(a == b for a, b in zip(timed[0][0].tokens, timed[0][1].tokens, strict=True))
