"""Shares of a pipeline, by counting."""
import itertools

import pytest

from hrm_megatron.config import PRESETS, Architecture, ConfigError
from hrm_megatron.parallel.stages import head_in_layers, microbatch_group, microbatch_windows, stage_layers


@pytest.mark.parametrize("num_layers, stages, head, layers", [
    (16, 4, 0.5, [4, 4, 4, 4]), (16, 4, 1.2, [5, 4, 4, 3]), (16, 2, 2.5, [9, 7]), (7, 4, 0.0, [2, 2, 2, 1]),
    (6, 4, 0.0, [1, 2, 2, 1]), (3, 2, 0.0, [2, 1]), (4, 4, 3.0, [1, 1, 1, 1]),
])
def test_layers_are_shared_for_the_slowest_stage(num_layers, stages, head, layers):
    assert stage_layers(num_layers, stages, head) == layers


@pytest.mark.parametrize("num_layers, stages, head", itertools.product((4, 7, 12, 16), (2, 3, 4), (0.0, 0.7, 2.2)))
def test_no_other_share_is_faster(num_layers, stages, head):
    def slowest(cut):
        return max(*cut[:-1], cut[-1] + head)
    ours = stage_layers(num_layers, stages, head)
    assert sum(ours) == num_layers and min(ours) >= 1 and len(ours) == stages and len(set(ours[1:-1])) <= 1
    others = [cut for cut in itertools.product(range(1, num_layers + 1), repeat=stages)
              if sum(cut) == num_layers and len(set(cut[1:-1])) <= 1]
    assert slowest(ours) == min(map(slowest, others))


def test_the_head_is_worth_what_its_multiplications_are():
    tiny = Architecture(2, 8, 2, 16, 256)
    # 3 * 8 * 256 for the head at every position; 8 forward and 2 * 5 backward passes of 8 * (5 * 8 + 3 * 16).
    assert head_in_layers(tiny, 5) == pytest.approx(3 * 8 * 256 / (18 * 8 * 88))
    xl = PRESETS["XL"]
    assert 0.5 < head_in_layers(Architecture(xl.num_layers, xl.hidden_size, xl.num_attention_heads, xl.ffn_hidden_size,
                                             65_536), 5) < 0.6


def test_microbatch_groups_leave_what_megatron_accepts():
    for stages in (2, 4, 8):
        for count in range(stages, 70):
            group = microbatch_group(count, stages)
            accepted = [n for n in range(stages, count + 1) if count % n == 0 or count % n >= stages]
            assert group == min(accepted)
    with pytest.raises(ConfigError, match="3 micro-batches per step are fewer than the 4 pipeline stages"):
        microbatch_group(3, 4)
    with pytest.raises(ConfigError, match="leaves stages without one of the 3 layers of each stack: choose at most 3"):
        stage_layers(3, 4, 0.0)


def test_windows_hold_every_micro_batch_once_and_enough_for_all_stages():
    for stages, window, count in itertools.product((2, 4), (4, 5, 8), range(4, 40)):
        windows = microbatch_windows(count, stages, window)
        assert [m for part in windows for m in part] == list(range(count))
        assert all(len(part) == window for part in windows[:-1]) and stages <= len(windows[-1]) < window + stages
    assert microbatch_windows(9, 4, None) == [range(9)]
    with pytest.raises(ConfigError, match="--pipeline-window 3 is less than the 4 pipeline stages: give at least 4"):
        microbatch_windows(8, 4, 3)
