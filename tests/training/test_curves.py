"""--log-hrm-norms: each curve is what its name says, by another computation of it."""
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.config import ConfigError
from hrm_megatron.model.ticks import ticks_of
from hrm_megatron.monitoring.run_folder import WHOLE, RunFolder
from hrm_megatron.optim import sizes
from hrm_megatron.optim.adam_atan2 import UPDATES, AdamATan2
from hrm_megatron.planner.machines import GPUS, known_peak
from hrm_megatron.training import reporting
from hrm_megatron.training.curve_flags import check_curves
from hrm_megatron.training.curves import TickNorms
from hrm_megatron.training.metrics import ThroughputMeter
from hrm_megatron.training.reporting import IntervalMeans, Reporter
from tests.model import exact
from tests.model.test_golden import batch_of, exact_inputs
from tests.rounding import ORDERS, REFERENCE_STATES
from tests.training.conftest import curves

ROOT = Path(__file__).parents[2]


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("case, bp_steps, overrides", [
    ("forward_pre", 5, {}), ("forward_pre", 2, {}), ("forward_post", 5, {}),
    ("forward_pre", 5, dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)),
    ("forward_pre", 5, dict(recompute_ticks=3))])
def test_states_and_residuals_are_those_of_the_formula(golden_case, reference_model, monkeypatch, case, bp_steps,
                                                       overrides):
    want = golden_case(case)
    config, weights = want.facts["config"], golden_case("init_hrm").tensors
    batch = batch_of(want.tensors)
    model = reference_model(config, weights, config["vocab_size"], **overrides)
    now = SimpleNamespace(measured=True)
    norms = TickNorms(lambda: now.measured)
    model(batch, bp_steps)[0].sum().backward()
    plain = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    norms.attach(model)
    for _ in range(2):  # two micro-batches
        model.zero_grad()
        model(batch, bp_steps)[0].sum().backward()
    assert all(p.grad is None if grad is None else torch.equal(p.grad, grad)
               for p, grad in zip(model.parameters(), plain, strict=True))  # to be watched changes nothing
    now.measured = False
    model(batch, bp_steps)
    now.measured = True
    model.eval()(batch, bp_steps)
    found = norms.take(ticks_of(model.config.arch), [])
    assert norms.take(ticks_of(model.config.arch), []) == {}

    normed, stock = [], exact.rms_norm
    monkeypatch.setattr(exact, "rms_norm", lambda x, eps: (normed.append(x), stock(x, eps))[1])
    with torch.no_grad():
        states = exact.Exact(config, weights).states(*exact_inputs(want.tensors))
    expected = {f"state RMS/tick {int(name[4:6]) + 1} {name[7:]}": rms(state) for name, state in states.items()
                if name.startswith("tick")}
    assert len(expected) == 8
    if case == "forward_pre":  # a stack norms before attention and MLP of each layer, and at its exit
        at_exit = normed[config["n_layers"]::config["n_layers"] + 1]
        expected |= {name.replace("state", "residual"): rms(x) for name, x in zip([*expected], at_exit, strict=True)}
        assert all(value > 1.2 for name, value in expected.items() if "residual" in name)
    assert found == pytest.approx(expected, rel=2 * ORDERS * REFERENCE_STATES)


def test_the_last_step_is_read_off_the_moments(single_rank, monkeypatch):
    monkeypatch.setattr(sizes, "SLICE_ELEMENTS", 7)  # smaller than the weights, and no divisor of them
    torch.manual_seed(3)
    now = SimpleNamespace()
    body, embedding = [torch.randn(5, 3), torch.randn(40)], [torch.randn(11)]
    optimizer = AdamATan2([dict(params=body), dict(params=embedding, is_embedding=True)], lr=0.02, weight_decay=0.3,
                          ema_decay=0.8, has_gradient=lambda group: not group.get("is_embedding") or now.trained)
    for now.trained in (True, False, True):
        for p in body + embedding:
            p.grad = torch.randn_like(p)
        before = torch.cat([p.flatten().double() for p in body + embedding])
        optimizer.step()
        after = torch.cat([p.flatten().double() for p in body + embedding])
        average = torch.cat([optimizer.state[p]["ema"].flatten().double() for p in body + embedding])
        expected = [t.norm().item() for t in (after - before, after, average - after)]
        # Weights of 1, rounded to 2^-24, move by 0.02.
        assert sizes.squares(optimizer).sqrt().tolist() == pytest.approx(expected, rel=1e-5)
    assert [group[UPDATES] for group in optimizer.param_groups] == [3, 2]


def test_the_distance_of_the_average_is_that_in_the_checkpoint(uninterrupted):
    found = curves(uninterrupted / "log")["EMA/relative distance"]
    for step in (12, 24):
        stored = DCPFolder(find_iteration(uninterrupted / "checkpoints", step))
        masters, averages = (torch.cat([stored.tensor(f"optimizer.state.{part}.{name}").flatten().double() for name in
                                        stored.shapes() if f"optimizer.state.param.{name}" in stored.shapes()])
                             for part in ("param", "ema"))
        # fp32 differences of weights that are a hundredth apart
        assert found[step] == pytest.approx((averages - masters).norm().item() / masters.norm().item(), rel=1e-5)


def test_a_report_says_which_saves_are_as_they_were_written(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    files = (tmp_path / "run" / "checkpoints" / "iter_0000012").glob("*.distcp")
    data = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    run = RunFolder.find(tmp_path / "run")
    assert [(save.step, save.state) for save in run.saves()] == [(12, WHOLE), (24, WHOLE)]
    found = runpy.run_path(str(ROOT / "tools" / "report_run.py"))["verified"](run)  # --verify
    assert found[12].startswith("damaged: ") and data.name in found[12] and found[24].startswith("verified, ")


NORMS, BY_SOURCE, REPORT = dict(log_hrm_norms=True), dict(log_loss_by_source=True), dict(run_report="run.html")


@pytest.mark.parametrize("asked, given, reason", [
    (NORMS, dict(tensorboard_dir=None), "has no effect without --tensorboard-dir"),
    (BY_SOURCE, dict(tensorboard_dir=None), "has no effect without --tensorboard-dir"),
    (NORMS, dict(skip_train=True), "is incompatible with --skip-train"),
    (BY_SOURCE, dict(skip_train=True), "is incompatible with --skip-train"),
    (REPORT, dict(tensorboard_dir=None), "has no effect without --tensorboard-dir"),
    (REPORT, dict(run_report="run.pdf"), "run.pdf: the name of this file must end with .html or .htm"),
    (NORMS, dict(use_torch_fsdp2=True), "not built under FSDP"),
    (NORMS, dict(use_megatron_fsdp=True), "not built under FSDP"),
    (BY_SOURCE, dict(sampled_data_path="DIR"), "a folder of HRM-Text .* does not say where its examples are from")])
def test_curves_that_nobody_could_read_are_refused(asked, given, reason):
    args = dict(log_hrm_norms=False, log_loss_by_source=False, run_report=None, tensorboard_dir="log", skip_train=False,
                use_torch_fsdp2=False, use_megatron_fsdp=False, sampled_data_path=None)
    check_curves(SimpleNamespace(**args | asked))
    if given.keys() != asked.keys():
        check_curves(SimpleNamespace(**args | given))
    flag = f"--{next(iter(asked)).replace('_', '-')}"
    with pytest.raises(ConfigError, match=f"{flag}.* {reason}"):
        check_curves(SimpleNamespace(**args | asked | given))


@pytest.fixture
def reporter(monkeypatch):
    """That of a run on two ranks: its `lines`, and the curves that it has `written`."""
    args = dict(log_interval=2, log_throughput=True, train_iters=40, world_size=2, global_batch_size=8, seq_length=64,
                on_nonfinite="abort", steps_left_out=[3], save="runs/x", async_save=False)
    reporter, lines, written = Reporter.__new__(Reporter), [], {}
    reporter.args, reporter.peak = SimpleNamespace(**args), 5e12
    reporter.means, reporter.overflows = IntervalMeans(), 0
    reporter.console = SimpleNamespace(last=True, width=120, line=lines.append, progress=lambda *_: None)
    reporter.time_left = SimpleNamespace(after=lambda step: None)
    reporter.lines, reporter.written = lines, written
    monkeypatch.setattr(reporting, "write_scalars", lambda values, step: written.update({step: values}))
    return reporter


def step_of(reporter, step, seconds, flops, skipped=0):
    reporter.flops = lambda: flops
    losses = {} if skipped else {"tokens per second": torch.tensor([8 * 64 / seconds])}
    reporter.training_log(lambda *_, **__: False, losses, {}, 1e-3, step, 2.0**20, False, skipped)


@pytest.mark.parametrize("peak, expected", [(5e12, {"MFU": 0.3}), (None, {})])
def test_mfu_is_model_flops_over_the_peak_where_that_is_known(reporter, peak, expected):
    reporter.peak = peak
    for step in (1, 2, 3):
        step_of(reporter, step, 1.0, 3e12)
    assert reporter.written == ({2: pytest.approx(expected)} if expected else {})


def test_rates_are_those_of_all_tokens_and_flops_over_all_seconds(reporter):
    """Neither the mean of the steps' rates, nor the last step's FLOPs: it may have more gradient ticks."""
    step_of(reporter, 1, 1.0, 1e12)
    step_of(reporter, 2, 3.0, 5e12)
    assert "        256 tokens/s  0.75 TFLOP/s/GPU" in reporter.lines[0]  # 2 x 512 positions, 6e12 on 2 ranks, in 4 s
    assert reporter.written == {2: {"MFU": pytest.approx(0.75 / 5)}}


def test_time_between_steps_is_not_that_of_a_step(reporter, monkeypatch):
    now = 0.0

    def wait(seconds):
        nonlocal now
        now += seconds
    monkeypatch.setattr(reporting, "flush_scalars", lambda: None)
    meter = ThroughputMeter(replicas=1, clock=lambda: now)
    reporter.running = SimpleNamespace(meter=meter)
    wait(1)  # the last backward pass of a step
    reporter.save_checkpoint(lambda iteration: wait(60), 2)
    reporter.evaluate_and_print_results(lambda prefix: wait(30), "iteration 2")
    wait(2)  # up to the next loss
    assert meter.lap(96) == (96, 3)


def test_steps_that_overflow_are_counted_in_a_line(reporter):
    """Not those that are left out: a line says so already."""
    for step in range(1, 7):
        step_of(reporter, step, 1.0, 1, skipped=int(step < 6))
    assert reporter.lines[:2] == [f"step {step:2}/40  {count} not taken: gradients overflowed; the loss scale is now "
                                  f"{2**20:g}" for step, count in ((2, 2), (4, 1))]
    assert reporter.lines[2].startswith("step  6/40  1 not taken") and reporter.lines[3].startswith("step  6/40  loss")
    reporter.args.on_nonfinite = "skip"
    step_of(reporter, 8, 1.0, 1, skipped=1)
    assert len(reporter.lines) == 4


def test_a_peak_is_that_of_a_data_sheet_or_none():
    assert known_peak("NVIDIA H100 80GB HBM3") == GPUS["h100-80gb"].flops_per_second
    assert known_peak("NVIDIA H100 PCIe") is None
