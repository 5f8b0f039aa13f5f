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
from hrm_megatron.model.schedule import ticks_of
from hrm_megatron.monitoring.run_folder import WHOLE, RunFolder
from hrm_megatron.optim import sizes
from hrm_megatron.optim.adam_atan2 import UPDATES, AdamATan2
from hrm_megatron.planner.machines import GPUS, known_peak
from hrm_megatron.training import reporting
from hrm_megatron.training.curve_flags import check_curves
from hrm_megatron.training.curves import TickNorms
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


@pytest.mark.parametrize("peak, expected", [(5e12, {"MFU": 0.3}), (None, {})])
def test_mfu_is_model_flops_over_the_peak_where_that_is_known(monkeypatch, peak, expected):
    args = dict(log_interval=2, log_throughput=True, train_iters=4, world_size=2, global_batch_size=8, seq_length=64)
    reporter, written = Reporter.__new__(Reporter), {}
    reporter.args, reporter.peak, reporter.means = SimpleNamespace(**args), peak, IntervalMeans()
    reporter.console = SimpleNamespace(last=True, width=120, line=lambda text: None, progress=lambda *_: None)
    reporter.time_left = SimpleNamespace(after=lambda step: None)
    reporter.flops = lambda: 3e12  # of a step, which two ranks take in a second
    monkeypatch.setattr(reporting, "write_scalars", lambda values, step: written.update({step: values}))
    for step in (1, 2, 3):
        losses = {"tokens per second": torch.tensor(8.0 * 64)}
        reporter.training_log(lambda *_, **__: False, losses, {}, 1e-3, step, 1.0, False, 0)
    assert written == ({2: pytest.approx(expected)} if expected else {})


def test_a_peak_is_that_of_a_data_sheet_or_none():
    assert known_peak("NVIDIA H100 80GB HBM3") == GPUS["h100-80gb"].flops_per_second
    assert known_peak("NVIDIA H100 PCIe") is None
