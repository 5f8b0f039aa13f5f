"""Time generation against transformers' HrmText: the same weights, prompts, process and threads, in turns."""
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
COPY_BYTES = 1 << 28  # far beyond every cache
MATMUL_SIZE = 1024


@dataclass(frozen=True)
class Timed:
    """Seconds to the end of the first token of all prompts and to the end of all, and what was generated."""

    first_seconds: float
    seconds: float
    tokens: list[list[int]]


def random_tensors(architecture: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw weights of unit gain, under Megatron's names and in its layout."""
    generator = torch.Generator().manual_seed(seed)
    return {entry.megatron: torch.randn(entry.shape, generator=generator) * (entry.shape[-1] ** -0.5 if entry.trained
            else 1.0) for entry in table(architecture)}


def random_prompts(rows: int, longest: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Draw prompts of mixed length, half to all of `longest`."""
    rng = np.random.default_rng(seed)
    return [rng.integers(14, vocab_size, length).tolist() for length in rng.integers(longest // 2, longest + 1, rows)]


def our_generation(weights: Weights, prompts: Sequence[Sequence[int]], new_tokens: int,
                   clock: Callable[[], float]) -> Callable[[], Timed]:
    """Generate greedily with the engine."""
    decoder = Decoder(weights, max(map(len, prompts)) + new_tokens)
    cache = PagedCache(decoder.cache_size(sum(blocks_needed(len(prompt), new_tokens) for prompt in prompts)))

    def run() -> Timed:
        engine = Engine(decoder, cache, len(prompts))
        start, begun, first_seconds = clock(), set(), 0.0

        def note(progress: Any) -> None:
            nonlocal first_seconds
            begun.add(progress.request)
            if not first_seconds and len(begun) == len(prompts):
                first_seconds = clock() - start
        found = engine.answer([Request(prompt, new_tokens) for prompt in prompts], note)
        return Timed(first_seconds, clock() - start, [samples[0].tokens for samples in found])
    return run


def transformers_model(architecture: Architecture, tensors: dict[str, torch.Tensor],
                       dtype: torch.dtype) -> HrmTextForCausalLM:
    """Put the same weights into transformers' model."""
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


def transformers_generation(model: HrmTextForCausalLM, prompts: Sequence[Sequence[int]], new_tokens: int,
                            vocab_size: int, clock: Callable[[], float]) -> Callable[[], Timed]:
    """Generate greedily with transformers: a batch padded on the left, prompts marked as prefixes."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    live = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    padding = [*range(vocab_size, model.config.vocab_size)]

    def run() -> Timed:
        start, times = clock(), []

        class Note:  # a streamer: is given the prompts, then the tokens of each step
            def put(self, value: torch.Tensor) -> None:
                times.append(clock() - start)

            def end(self) -> None:
                return None
        out = model.generate(input_ids=ids, attention_mask=live, token_type_ids=live, max_new_tokens=new_tokens,
                             do_sample=False, eos_token_id=None, suppress_tokens=padding or None,
                             streamer=Note() if len(prompts) == 1 else None)
        seconds = clock() - start
        if len(times) < 2:  # transformers streams a single prompt only
            start = clock()
            model.generate(input_ids=ids, attention_mask=live, token_type_ids=live, max_new_tokens=1, do_sample=False,
                           eos_token_id=None, suppress_tokens=padding or None)
            times = [0.0, clock() - start]
        return Timed(times[1], seconds, out[:, width:].tolist())
    return run


def copied_bytes_per_second() -> float:
    """Measure the memory's bandwidth on torch's threads: bytes read and written by a copy, best of five."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * COPY_BYTES / best


def fastest_seconds(weights: Weights, prompts: Sequence[Sequence[int]], new_tokens: int, flops_per_second: float,
                    bytes_per_second: float) -> float:
    """Seconds that matmuls and memory need for such answers if nothing else took time.

    A token costs two operations per weight of each tick that reads it. Each token after the first reads the weights or
    multiplies with them, whichever takes longer, and its cache: keys and values of its positions so far.
    """
    a, element = weights.architecture, weights.embedding.element_size()
    head, read, steps = weights.head.nbytes / element, sum(map(len, prompts)), new_tokens - 1
    token = weights.tick_bytes / element  # weights that a token of an answer is multiplied with
    position_bytes = a.h_cycles * (a.l_cycles + 1) * a.num_layers * 2 * a.num_attention_heads * a.head_dim * element
    positions = steps * read + len(prompts) * steps * (steps + 1) // 2
    prefill = 2 * (read * (token - head) + len(prompts) * head) / flops_per_second
    step = max(2 * len(prompts) * token / flops_per_second, weights.tick_bytes / bytes_per_second)
    return prefill + steps * step + positions * position_bytes / bytes_per_second


def compare_generation(names: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], prompt_tokens: int,
                       new_tokens: int, pairs: int, cpu_time: bool) -> None:
    """Print tokens/s and time to first token of both, medians and the median over the pairs of theirs over ours."""
    clock = time.process_time if cpu_time else time.perf_counter
    bandwidth = copied_bytes_per_second()
    print(f"greedy, prompts of {prompt_tokens // 2} to {prompt_tokens} tokens, {new_tokens} new ones each, {pairs} "
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
                prompts = random_prompts(rows, prompt_tokens, architecture.vocab_size)
                runs = (our_generation(weights, prompts, new_tokens, clock),
                        transformers_generation(model, prompts, new_tokens, architecture.vocab_size, clock))
                for run in runs:
                    run()  # warms up
                timed = [tuple(run() for run in runs) for _ in range(pairs)]
                _print_row(f"{name} {dtype} batch {rows}", timed, rows * new_tokens, new_tokens * weights.tick_bytes,
                           fastest_seconds(weights, prompts, new_tokens, rate, bandwidth))


def _print_row(what: str, timed: Sequence[tuple[Timed, ...]], tokens: int, weight_bytes: int, fastest: float) -> None:
    ours, theirs = (statistics.median(pair[side].seconds for pair in timed) for side in (0, 1))
    first, their_first = (statistics.median(pair[side].first_seconds for pair in timed) for side in (0, 1))
    ratio = statistics.median(pair[1].seconds / pair[0].seconds for pair in timed)
    same = sum(a == b for a, b in zip(timed[0][0].tokens, timed[0][1].tokens, strict=True))
    print(f"{what:24} {tokens / ours:8.1f} tokens/s against {tokens / theirs:8.1f}: {ratio:5.2f} times; first token "
          f"{first:.3f} s against {their_first:.3f}; {weight_bytes / ours / 1e9:.1f} GB/s of weights read; "
          f"matmuls and memory alone {tokens / fastest:.1f} tokens/s; same answers {same} of "
          f"{len(timed[0][0].tokens)}", flush=True)
