"""The table of presets: what is published, what our rules make, and layouts that the planner finds."""
import math
import subprocess
import sys
from pathlib import Path

import pytest

from hrm_megatron.config import FORK, OUR_BATCH, OUR_LR, PRESETS, PUBLISHED, ConfigError
from hrm_megatron.planner.flops import training_flops
from hrm_megatron.planner.machines import Cluster
from hrm_megatron.planner.presets import default_layout, describe_preset, layout_flags, table
from hrm_megatron.planner.search import Plan, Question, layouts, search, settle

ROOT = Path(__file__).parents[2]
XL = PRESETS["XL"]
PLACES = [(name, gpus) for name, preset in PRESETS.items() for gpus in preset.layouts]


def asked(name, gpus):
    preset = PRESETS[name]
    architecture = preset.architecture()
    return Question(architecture, Cluster.of("h100-80gb", gpus), 20 * architecture.num_parameters,
                    preset.tokens_per_step // 4096)


def test_sizes_are_those_that_are_published_and_grow():
    billions = {name: preset.architecture().num_parameters / 1e9 for name, preset in PRESETS.items()}
    # HRM-Text's five; of its fork 5.6 and 11.3 B.
    assert {name: round(size, 3) for name, size in billions.items() if PRESETS[name].sizes == PUBLISHED} == {
        "B": 0.301, "L": 0.695, "XL": 1.183, "XXL": 3.274, "XXL_wide": 3.083}
    assert [round(billions[name], 1) for name, preset in PRESETS.items() if preset.sizes == FORK] == [5.6, 11.3]
    assert [round(billions[name]) for name in ("20B", "32B")] == [20, 32]
    assert all(preset.hidden_size == 128 * preset.num_attention_heads for preset in PRESETS.values())


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.lr_from == OUR_LR])
def test_rates_and_batches_follow_the_rules(name):
    preset = PRESETS[name]
    assert preset.lr == float(f"{XL.lr * XL.hidden_size / preset.hidden_size:.1e}")
    assert preset.batch_from == OUR_BATCH
    flops, of_xl = (training_flops(one.architecture(), 5, 1, 1) for one in (preset, XL))
    wanted = XL.tokens_per_step * (flops / of_xl) ** 0.3271
    near = [factor * 2**n for n in range(10, 24) for factor in (1, 3)]
    assert preset.tokens_per_step == min(near, key=lambda tokens: abs(math.log(tokens / wanted)))


def test_the_rules_give_nearly_what_is_published_of_l():
    rate = XL.lr * XL.hidden_size / PRESETS["L"].hidden_size
    assert rate == pytest.approx(PRESETS["L"].lr, rel=0.06)  # 2.64e-4 against 2.5e-4


@pytest.mark.parametrize("name, gpus", PLACES)
def test_default_layouts_fit_as_they_stand(name, gpus):
    chosen, question = PRESETS[name].layouts[gpus], asked(name, gpus)
    layout = next(one for one in layouts(question) if (one.tensor, one.pipeline, one.context, one.micro_batch_size)
                  == (chosen.tensor, chosen.pipeline, chosen.context, chosen.micro_batch_size))
    plan = settle(question, layout)
    assert isinstance(plan, Plan)
    assert (plan.saving.recompute_ticks, plan.saving.gated_act) == (chosen.recompute_ticks, chosen.gated_act)


@pytest.mark.parametrize("gpus, said", [(2, "for 2 GPUs, but for 8, 64, 512; python tools/plan.py .*--gpus 2 finds"),
                                        (0, "for 8, 64, 512 GPUs, and there are none; leave LAYOUT out")])
def test_a_number_of_gpus_without_a_layout_has_a_way_out(gpus, said):
    with pytest.raises(ConfigError, match=f"preset XL: has (no|a) default layout {said}"):
        default_layout("XL", gpus)


def same(name, gpus):
    best = search(asked(name, gpus))[0][0]
    chosen = PRESETS[name].layouts[gpus]
    assert (best.layout.tensor, best.layout.pipeline, best.layout.context, best.layout.micro_batch_size) \
        == (chosen.tensor, chosen.pipeline, chosen.context, chosen.micro_batch_size)


@pytest.mark.parametrize("name, gpus", [("B", 8), ("B", 512)])
def test_default_layouts_are_what_the_planner_finds(name, gpus):
    same(name, gpus)


@pytest.mark.slow
@pytest.mark.parametrize("name, gpus", PLACES)
def test_all_default_layouts_are_what_the_planner_finds(name, gpus):
    same(name, gpus)


def test_a_preset_is_shown_whole_with_what_was_given_by_hand():
    shown = describe_preset("XXXL", PRESETS["XXXL"], {"lr": 3e-5, "seq_length": 9}).splitlines()
    assert shown[0].startswith("preset XXXL: 5.60 B parameters")
    values = {line[2:20].strip(): line[20:].split(maxsplit=1) for line in shown[1:7]}
    assert values["layers per stack"] == ["48", FORK] and values["learning rate"] == ["3e-05", "by hand"]
    assert values["tokens per step"] == ["393,216", OUR_BATCH]
    assert [line.split(":")[0].strip() for line in shown[7:]] == [f"{n} H100 of 80 GB" for n in (8, 64, 512)]
    assert shown[8].endswith(" ".join(layout_flags(PRESETS["XXXL"].layouts[64])))


def test_the_page_is_the_table():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert table() in page, "print it again: python -m hrm_megatron.planner.presets"


def test_scripts_read_the_same_table():
    done = subprocess.run([sys.executable, "-m", "hrm_megatron.planner.presets", "XXXL", "64"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.split() == layout_flags(PRESETS["XXXL"].layouts[64])
    with pytest.raises(ConfigError, match="no default layout for 9 GPUs, but for 8, 64, 512; .* --gpus 9 finds one"):
        default_layout("XL", 9)
