"""Ticks that keep only their input: gradients as without, and memory as counted."""
import itertools
from functools import partial

import pytest
import torch

from tests.model.small import ARCHITECTURE, ROW_TOKENS, batch, build, furthest, gradients, kept_bytes


@pytest.mark.parametrize("bp_steps", [2, 3, 4, 5])
def test_gradients_are_those_without(single_rank, parity, bp_steps):
    wanted = gradients(build(), bp_steps)
    for name, want in wanted.items():
        assert (want is None) == (bp_steps == 2 and "embedding" in name), name
    for ticks in range(bp_steps + 1):
        worst = furthest(gradients(build(recompute_ticks=ticks), bp_steps), wanted)
        # Bitwise: the first ticks come last in backward, whether they run again or not.
        parity(f"recompute {ticks} of {bp_steps} ticks: gradients", worst, 0.0)


@pytest.mark.parametrize("modules", [["core_attn"], ["mlp"], ["core_attn", "mlp"]], ids="+".join)
@pytest.mark.parametrize("ticks", [0, 1, 3])
def test_layers_recompute_parts_of_themselves_in_every_tick(single_rank, ticks, modules):
    wanted = gradients(build(recompute_ticks=ticks), 3)
    have = gradients(build(recompute_ticks=ticks, recompute_granularity="selective", recompute_modules=modules), 3)
    for name, want in wanted.items():
        assert torch.equal(have[name], want), name


@pytest.mark.parametrize("bp_steps", [2, 5])
def test_a_tick_that_runs_again_keeps_its_input_alone(single_rank, bp_steps):
    kept, rows = [], batch()
    for ticks in range(bp_steps + 1):
        model = build(recompute_ticks=ticks)
        sequences = model.sequences(rows)
        shared = [*model.parameters(), *vars(sequences.rotation).values()]
        kept.append(kept_bytes(partial(model, batch=rows, bp_steps=bp_steps, sequences=sequences), shared))
    state = torch.randn(ROW_TOKENS, 1, ARCHITECTURE.hidden_size)
    # At two steps no gradient enters the first tick, and its first norm keeps less.
    of_first, of_others = (kept_bytes(partial(model.l_stack, state.clone().requires_grad_(enters), attention_mask=None,
                                              packed_seq_params=sequences), shared) for enters in (bp_steps > 2, True))
    input_bytes = state.numel() * 4
    assert of_others >= of_first > 20 * input_bytes
    print(f"a tick keeps {of_others} bytes, its input has {input_bytes}; a step keeps {kept}")
    falls = [before - after for before, after in itertools.pairwise(kept)]
    assert falls == [of_first - input_bytes, *[of_others - input_bytes] * (bp_steps - 1)]
