"""Sums of memory against what torch and Megatron count, as far as a CPU can tell; tests/te counts activations."""
from pathlib import Path

import pytest

from hrm_megatron.config import PRESETS, Architecture
from hrm_megatron.planner.memory import activation_bytes, layer_states, model_bytes, offloaded_bytes

XL = Architecture(16, 1536, 12, 4096, 65_536)


def test_a_replica_on_one_gpu_takes_22_bytes_a_weight():
    assert model_bytes(XL) == 22 * XL.num_parameters == 22 * 1_182_793_728
    assert model_bytes(XL, 8) == (6 + 2) * XL.num_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_activations_grow_with_positions_and_gradient_ticks(name):
    preset = PRESETS[name]
    architecture = Architecture(preset.num_layers, preset.hidden_size, preset.num_attention_heads,
                                preset.ffn_hidden_size, 65_536)
    one = activation_bytes(architecture, 1, 1)
    assert activation_bytes(architecture, 7, 5) == pytest.approx(35 * one)
    assert one == layer_states(architecture) * 2 * preset.hidden_size * preset.num_layers


def test_a_recomputed_tick_keeps_its_input_and_is_rebuilt_alone():
    tick, state = activation_bytes(XL, 1, 1), 2 * XL.hidden_size
    assert activation_bytes(XL, 1, 5, recompute_ticks=3) == pytest.approx(2 * tick + 3 * state)
    assert activation_bytes(XL, 1, 5, recompute_ticks=5) == pytest.approx(tick + 5 * state)
    assert activation_bytes(XL, 1, 5, gated_act=True) < activation_bytes(XL, 1, 5)


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
    architecture = Architecture(preset.num_layers, preset.hidden_size, preset.num_attention_heads,
                                preset.ffn_hidden_size, 65_536)

    def fits(positions, gpus):
        return model_bytes(architecture, gpus) + activation_bytes(architecture, positions, 5) < 0.95 * 80e9
    gpus = 1 if fits(4096, 1) else 8
    assert fits(preset.positions, gpus) or not preset.positions
    assert not fits(preset.positions + 1024, gpus) and preset.positions % 1024 == 0
