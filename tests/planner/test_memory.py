"""Sums of memory against what torch and Megatron count, as far as a CPU can tell; tests/te counts activations."""
from pathlib import Path

import pytest

from hrm_megatron.config import PRESETS, Architecture
from hrm_megatron.planner.layout import Layout
from hrm_megatron.planner.memory import BF16, Saving, kept_tensors, layer_states, memory_of_stages

XL = Architecture(16, 1536, 12, 4096, 65_536)


def memory(architecture, positions=4096, gpus=1, **saving):
    layout = Layout(gpus, row_tokens=positions)
    return memory_of_stages(architecture, layout, [architecture.num_layers], Saving(**saving))[0]


@pytest.mark.parametrize(("gpus", "bytes_of_a_weight"), [(1, 22), (8, 6 + 2)])
def test_what_a_weight_takes(gpus, bytes_of_a_weight):
    parts = memory(XL, gpus=gpus).parts
    of_weights = sum(parts[name] for name in ("weights", "gradients", "masters", "moments", "EMA"))
    assert of_weights == bytes_of_a_weight * XL.num_parameters == bytes_of_a_weight * 1_182_793_728


@pytest.mark.parametrize("name", PRESETS)
def test_activations_grow_with_positions_and_gradient_ticks(name):
    architecture = PRESETS[name].architecture()
    two = memory(architecture, 1024, bp_steps=2).parts["activations"]
    assert memory(architecture, 7 * 1024, bp_steps=5).parts["activations"] == pytest.approx(7 * 5 / 2 * two)
    state = 2 * architecture.hidden_size * 1024
    assert two == 2 * (layer_states(architecture) * architecture.num_layers + 1) * state


def test_a_recomputed_tick_keeps_its_input_and_is_rebuilt_alone():
    tick, state = memory(XL, bp_steps=2).parts["activations"] / 2, 2 * XL.hidden_size * 4096
    assert memory(XL, recompute_ticks=3).parts["activations"] == pytest.approx(2 * tick + 3 * state)
    assert memory(XL, recompute_ticks=5).parts["activations"] == pytest.approx(tick + 5 * state)
    assert memory(XL, gated_act=True).total < memory(XL).total


def offloaded_bytes(architecture, positions):
    """What one layer and tick with gradient keep in the host's memory, and the pinned memory for it: torch's allocator
    rounds each tensor up to a power of two (CachingHostAllocator.h)."""
    state = positions * architecture.hidden_size * BF16
    sizes = [round(states * state) for states in kept_tensors(architecture)]
    return sum(sizes), sum(1 << (size - 1).bit_length() for size in sizes)


def test_pinned_memory_is_rounded_up_as_docs_say():
    kept, pinned = offloaded_bytes(XL, 1 << 14)
    assert kept == layer_states(XL) * (state := 2**14 * 1536 * 2)  # 0.75 of 2^26
    # Eight states and the gated result, two quarters, both products of the MLP: 5 1/3 and 2 2/3 states.
    assert pinned == 9 * 2**26 + 2 * 2**24 + 2**28 + 2**27 and 3 * 2**24 == state
    guide = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    for positions in (16_384, 24_576):
        kept, pinned = (size * XL.num_layers / positions / 1e6 for size in offloaded_bytes(XL, positions))
        assert f"{kept:.2f} MB" in guide and f"{pinned:.2f} MB at {positions:,} positions" in guide


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_how_many_positions_fit(name):
    preset = PRESETS[name]

    def fits(positions, gpus):
        return memory(preset.architecture(), positions, gpus).total < 0.95 * 80e9
    gpus = 1 if fits(4096, 1) else 8
    assert fits(preset.positions, gpus) or not preset.positions
    assert not fits(preset.positions + 1024, gpus) and preset.positions % 1024 == 0
