"""What the planner predicts and finds, by arithmetic that can be followed by hand."""
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hrm_megatron.config import PRESETS, Architecture, ConfigError
from hrm_megatron.planner import calibration, report
from hrm_megatron.planner.calibration import Calibration, Case, Measured
from hrm_megatron.planner.layout import Layout, check, plan_pipeline
from hrm_megatron.planner.machines import Cluster, Speeds
from hrm_megatron.planner.memory import Saving, layer_states, memory_of_stages
from hrm_megatron.planner.search import Question, Rejected, search
from hrm_megatron.planner.speed import predict_step
from tests.tools import load_tool

ROOT = Path(__file__).parents[2]
SMALL = Architecture(6, 512, 4, 1536, 4096)


def ask(**changes):
    return Question(**dict(dict(architecture=SMALL, cluster=Cluster.of("h100-80gb", 8), tokens=4e7, rows=24,
                                row_tokens=1024) | changes))


# tokens/s of an H100 that HRM-Text publishes, and rows of its runs; the shares were fitted to XL alone.
@pytest.mark.parametrize("name, row_tokens, published, off", [
    ("XL", 24_576, 22_600, 0.01), ("L", 21_504, 39_000, 0.05)])
def test_speeds_are_those_that_are_published(name, row_tokens, published, off):
    architecture = PRESETS[name].architecture()
    layout = Layout(8, row_tokens=row_tokens, global_batch_size=8)
    step = predict_step(architecture, layout, [architecture.num_layers], Saving(), Cluster.of("h100-80gb", 8))
    assert step.tokens_per_second == pytest.approx(published, rel=off)


def test_memory_is_the_sum_of_its_parts():
    layout = Layout(8, micro_batch_size=2, row_tokens=1024, global_batch_size=16)
    found = memory_of_stages(SMALL, layout, [6], Saving(labels=0.0))[0]
    states = sum(found.parts[name] for name in ("weights", "gradients", "masters", "moments", "EMA"))
    assert states == pytest.approx((6 + 16 / 8) * SMALL.num_parameters)
    state = 2048 * 512 * 2
    tick = layer_states(SMALL) * SMALL.num_layers + 1  # the norm at its exit
    assert found.parts["activations"] == pytest.approx(5 * tick * state)
    assert sum(found.ticks.values()) == found.parts["activations"] and len(found.ticks) == 5
    assert found.total == sum(found.parts.values())


def test_pipelines_keep_the_graphs_that_the_simulation_counts():
    layout = Layout(8, 1, 2, 1, False, 1024, 1, 32)
    plan = plan_pipeline(SMALL, 5, layout.microbatches, 2)
    first, last = memory_of_stages(SMALL, layout, [3, 3], Saving(), plan)
    whole = memory_of_stages(SMALL, Layout(4, row_tokens=1024, global_batch_size=32), [3], Saving())[0]
    assert first.parts["activations"] == pytest.approx(plan.estimate.live_graphs / 5 * whole.parts["activations"])
    assert first.parts["parked states"] == plan.parked * 1024 * 512 * 2 and not last.parts["parked states"]


def test_plans_are_sorted_and_within_memory_and_all_others_have_a_reason():
    question = ask()
    plans, rejected = search(question)
    assert len(plans) > 3 and [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
    assert plans[0].layout.tensor == 1  # of a small model nothing is worth sending activations for
    assert all(check(SMALL, plan.layout, 5) == plan.layers for plan in plans)
    assert all(isinstance(one, Rejected) and one.reason for one in rejected)
    assert any("does not divide the 4 attention heads" in one.reason for one in rejected)
    counts = question.steps_by_bp()
    assert sum(counts.values()) == question.steps == -(-int(4e7) // (24 * 1024)) and set(counts) == {2, 3, 4, 5}
    assert plans[0].seconds == pytest.approx(sum(counts[bp] * plans[0].by_bp[bp].seconds for bp in counts))


def test_little_memory_recomputes_and_too_little_is_refused():
    roomy = search(ask())[0][0].memory.total / 1e9
    plans, _ = search(ask(cluster=Cluster.of("h100-80gb", 1, memory_gb=5.0), rows=8, row_tokens=8192))
    assert plans[0].saving.gated_act and plans[0].memory.total <= 0.95 * 5e9 and roomy < 80
    plans, rejected = search(ask(cluster=Cluster.of("h100-80gb", 1, memory_gb=0.5)))
    assert not plans and all("GB of 0 that may be filled" in one.reason for one in rejected)


def test_fp8_is_faster_and_has_its_own_divisions():
    bf16, fp8 = (search(ask(precisions=(kind,)))[0][0] for kind in ("bf16", "fp8"))
    assert fp8.seconds < bf16.seconds and "FP8" in fp8.name and not fp8.saving.gated_act
    layers = 2 * fp8.layers[fp8.memory.stage]
    assert fp8.memory.parts["FP8 weights"] == 2 * layers * ask().architecture.layer_parameters / fp8.layout.tensor
    assert "FP8 weights" not in bf16.memory.parts
    odd = Architecture(6, 520, 4, 1536, 4096)
    plans, rejected = search(ask(architecture=odd, precisions=("fp8",)))
    assert not plans and any("520 hidden channels on a rank are no multiple of 16" in one.reason for one in rejected)
    _, rejected = search(ask(cluster=Cluster.of("a100-80gb", 8), precisions=("fp8",)))
    assert any("a100-80gb has no FP8" in one.reason for one in rejected)


def measured(speeds):
    cases = [Case(layers, hidden, 2, 512, rows, bp) for layers, hidden, rows, bp in (
        (1, 128, 1, 2), (2, 128, 2, 5), (1, 256, 1, 5), (3, 256, 2, 2), (2, 384, 1, 3), (1, 512, 2, 4))]
    known = Calibration("cpu", 4, True, speeds, (), ())
    return tuple(Measured(case, known.step(case).seconds, round(known.memory(case).total)) for case in cases)


def test_a_fit_finds_the_speeds_by_which_steps_took_their_time(tmp_path):
    true = Speeds(1e11, 1e11, 2e10, 5e9, 1e-3, hidden=False, source="made up")
    steps = measured(true)
    found = calibration.fit(steps, 4, False, "made up")
    for name in ("matmul", "elementwise", "optimizer", "host_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)  # exact, but for lstsq's rounding
    kept = Calibration("cpu", 4, True, found, steps, steps[:1])
    kept.write(tmp_path / "a.json")
    assert calibration.read(tmp_path / "a.json") == kept and [*tmp_path.iterdir()] == [tmp_path / "a.json"]


def test_another_file_is_no_calibration(tmp_path):
    for text in ("", "{}", '{"version": 1}', '{"version": 2}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ConfigError, match="a.json: is not what .*; make it again"):
            calibration.read(tmp_path / "a.json")


def run_tool(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, words)])
    return runpy.run_path(str(ROOT / "tools" / "plan.py"))["main"]()


def test_the_tool_answers_in_text_data_and_a_picture(monkeypatch, capsys, tmp_path):
    words = ("--sizes", 4, 512, 4, "--gpus", 16, "--tokens-per-step", 98_304, "--tokens", 1e7, "--explain",
             "--price", 2, "--json", tmp_path / "p.json", "--png", tmp_path / "p.png")
    assert run_tool(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "p.json").read_text())
    best = found["plans"][0]
    assert best["command"] in out and "Times are predictions" in out and "activations by tick: H3 " in out
    assert best["tensor"] * best["pipeline"] * best["context"] * best["data"] == 16
    waiting, behind = found["goodput"]["saves"]
    assert f"  {waiting['effective']:.1%} on average, " in out and f" with {behind['flags']}, " in out
    assert f"{len(found['rejected'])} other layouts:" in out and found["times_are"] == "predictions"
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("words, says", [
    (("--hrm-preset", "XL", "--gpus", 0), "--gpus 0: must be at least 1"),
    (("--hrm-preset", "XL", "--gpus", 12), "--gpus 12: no multiple of 8 GPUs per node; choose 8 or 16"),
    (("--hrm-preset", "XL", "--gpus", 8, "--save-seconds", -1), "--save-seconds -1.0: must be above 0"),
    (("--sizes", 4, 512, 4, "--gpus", 8), "--tokens-per-step is not set"),
    (("--hrm-preset", "XL", "--gpus", 8, "--seq-length", 4000), "--seq-length 4000: does not divide the 196608"),
    (("--hrm-preset", "32B", "--gpus", 1), "32B fits no layout; give more GPUs"),
    (("--hrm-preset", "XL", "--gpus", 8, "--tokens", "inf"), "--tokens inf: must be at least 1, and at most"),
    (("--hrm-preset", "XL", "--gpus", 8, "--tokens", "nan"), "--tokens nan: must be at least 1, and at most"),
    (("--hrm-preset", "XL", "--gpus", 8, "--example", 0, 0), "--example 0 0: a prefix has at least 0 tokens, a resp"),
    (("--hrm-preset", "XL", "--gpus", 8, "--example", 4000, 97), "--example 4000 97: a prefix has .* the 4096 of a ro"),
    (("--hrm-preset", "XL", "--gpus", 8, "--bp-max-steps", 12), "--bp-max-steps 12: bp_steps=12 does not fit h_cyc"),
    (("--hrm-preset", "XL", "--gpus", 8, "--bp-min-steps", 1), "--bp-min-steps 1: bp_steps=1 does not fit h_cycles=2"),
    (("--hrm-preset", "XL", "--gpus", 8, "--gpu", "a100-40gb", "--precision", "fp8"),
     "--precision fp8: a100-40gb has no FP8; leave it out, or plan for another --gpu"),
    (("--sizes", 4, 520, 4, "--gpus", 8, "--tokens-per-step", 65536, "--precision", "fp8"),
     "4 layers of 520 fits no layout; none lacks memory: change what the reasons above name"),
    (("--hrm-preset", "XL", "--gpus", 8, "--memory-gb", -3), "--memory-gb -3.0: must be above 0"),
    (("--hrm-preset", "XL", "--gpus", 8, "--network-gb", 0), "--network-gb 0.0: must be above 0"),
])
def test_the_tool_refuses_in_one_line(monkeypatch, capsys, words, says):
    assert run_tool(monkeypatch, *words) != 0
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{says}", line)


def test_the_usual_example_fits_into_a_row():
    plan = load_tool("plan")
    for row_tokens, example in ((4096, (288, 544)), (832, (288, 544)), (416, (144, 272)), (1, (0, 1))):
        args = plan.parser().parse_args(["--hrm-preset", "XL", "--gpus", "8", "--seq-length", str(row_tokens),
                                         "--tokens-per-step", str(64 * row_tokens)])
        assert plan.question(args).example == example


def test_speeds_of_a_cpu_are_none_of_a_gpu(monkeypatch, capsys, tmp_path):
    Calibration("some cpu", 4, True, Speeds(1, 1, 1, 1, 0), (), ()).write(tmp_path / "c.json")
    assert run_tool(monkeypatch, "--hrm-preset", "B", "--gpus", 8, "--calibrate", tmp_path / "c.json")
    assert "was measured on a CPU (some cpu); measure on a h100-80gb" in capsys.readouterr().err
    there = Speeds(1e13, 1e13, 1e12, 1e12, 0, source="measured there")
    Calibration("some gpu", 2, False, there, (), ()).write(tmp_path / "c.json")
    assert not run_tool(monkeypatch, "--hrm-preset", "B", "--gpus", 8, "--calibrate", tmp_path / "c.json")
    assert "Times are predictions: measured there" in capsys.readouterr().out


@pytest.mark.parametrize("device, itemsize, gpu, says", [
    ("NVIDIA B200", 2, "a100-80gb", "was measured on a b200-180gb, and --gpu is a100-80gb"),
    ("NVIDIA H200", 4, "h200-141gb", "was measured in fp32, and plans are for bf16"),
])
def test_speeds_of_another_gpu_or_number_format_are_refused(monkeypatch, capsys, tmp_path, device, itemsize, gpu, says):
    Calibration(device, itemsize, False, Speeds(1e13, 1e13, 1e12, 1e12, 0), (), ()).write(tmp_path / "c.json")
    assert run_tool(monkeypatch, "--hrm-preset", "B", "--gpus", 8, "--gpu", gpu, "--calibrate", tmp_path / "c.json")
    assert says in capsys.readouterr().err


def test_the_command_starts_the_plan():
    question = ask()
    plan = search(question)[0][0]
    line = report.command(plan, question, "B")
    assert line.startswith(f"PRESET=B TP={plan.layout.tensor} PP={plan.layout.pipeline} CP={plan.layout.context} "
                           f"DP={plan.layout.replicas} launch_scripts/train_node.sh ")
    assert f"--global-batch-size 24 --train-iters {question.steps}" in line and "--bp-" not in line


@pytest.mark.parametrize("tokens, warmup", [(4e7, 1628 // 25), (1e10, 2000)])
def test_the_command_has_what_the_readme_trains_with(tokens, warmup):
    """But for the layout and what is recomputed, which the plan chooses."""
    question = ask(tokens=tokens)
    line = report.command(search(question)[0][0], question, "B")
    [started, *_] = re.findall(r"^PRESET=XL launch_scripts/train_node\.sh (.*?)^```", (ROOT / "README.md").read_text(),
                               re.M | re.S)
    theirs, ours = (set(re.findall(r"--[a-z-]+", text)) for text in (started, line))
    chosen = {flag for flag in theirs if flag.startswith("--recompute")}
    assert theirs - ours - chosen == {"--save-interval", "--tensorboard-dir"}  # goodput says the first
    assert f" --lr-warmup-iters {warmup}" in line and " --tokenizer-model TOKENIZER " in line


def test_the_command_of_a_job_asks_for_whole_nodes():
    question = ask(cluster=Cluster.of("h100-80gb", 24))
    line = report.command(search(question)[0][0], question, "B")
    assert " sbatch --nodes 3 --gpus-per-node 8 --exclusive launch_scripts/train_slurm.sh " in line


def test_the_command_trains_as_many_ticks_as_were_planned_for():
    question = replace(ask(), bp=(3, 4, 0.5))
    line = report.command(search(question)[0][0], question, "B")
    assert "--bp-min-steps 3 --bp-max-steps 4 --bp-warmup-fraction 0.5" in line
