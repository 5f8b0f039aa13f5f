"""Settings for all tests: one thread per process, and GPU tests skipped where there is no GPU."""
from __future__ import annotations

import gc
import json
import logging
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; ranks share the cores

gc.disable()  # a tenth of all imports, of which nothing is garbage

GOLDEN = Path(__file__).parent / "golden"
PARITY, SURVIVED = "parity", "survives"  # under which reports carry them, also from the processes of pytest-xdist
SLOW_SECONDS = 1800  # what takes minutes on an idle machine; the limit of pyproject.toml is for all else


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests more time before they are held to hang."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


def pytest_collection_finish() -> None:
    """Look for garbage from now on, and not among what has been imported."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked gpu where torch sees no CUDA device; note the faults that tests are marked with."""
    item.user_properties += [(SURVIVED, mark.args) for mark in item.iter_markers(SURVIVED)]
    if item.get_closest_marker("gpu"):
        import torch  # late: most of the house tests need no torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def levels_of_loggers():
    """Undo what a tool that was called has set for its process: which of our lines are shown."""
    yield
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "hrm_megatron"]:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def single_rank():
    """This process as the only rank of a Megatron world, for all tests that ask."""
    from hrm_megatron.parallel.cpu import activate

    activate()
    from hrm_megatron.parallel.single import single_rank

    with single_rank():
        yield


@pytest.fixture
def parity(request):
    """Hold a difference against its tolerance, `parity(what, difference, tolerance)`, and put it into the table."""
    def hold(what: str, difference: float, tolerance: float) -> None:
        request.node.user_properties.append((PARITY, (what, difference, tolerance)))
        assert difference <= tolerance, what
    return hold


@pytest.fixture
def survived(request):
    """Put a fault that a run has survived into the table: `survived(fault, run)`."""
    def note(fault: str, run: str) -> None:
        request.node.user_properties.append((SURVIVED, (fault, run)))
    return note


def pytest_terminal_summary(terminalreporter):
    """Print the table of all differences that tests have held against a tolerance, and that of faults survived."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports
               if getattr(report, "when", None) == "call"]
    if rows := [row for report in reports for name, row in report.user_properties if name == PARITY]:
        terminalreporter.section("parity")
        for what, difference, tolerance in rows:
            terminalreporter.line(f"{what:64} {difference:9.1e}   at most {tolerance:.0e}")
    if faults := Counter(tuple(row) for report in reports if report.passed
                         for name, row in report.user_properties if name == SURVIVED):
        terminalreporter.section("faults survived")
        for (fault, run), times in sorted(faults.items()):
            terminalreporter.line(f"{fault:56} {run:24} {times:4}")
        terminalreporter.line(f"{'in all':56} {'':24} {faults.total():4}")


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Run `hrm_megatron.pretrain` on forked ranks: `launch(*arguments, ranks=2)`, see tests/launch.py."""
    from tests.launch import Launcher

    launcher = Launcher(tmp_path_factory.mktemp("launch"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """Programs `python` and `torchrun` that start commands of the project at once: see tests/warm.py."""
    from tests.warm import Commands

    started = Commands(tmp_path_factory.mktemp("commands"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of HRM-Text's numbers."""
    return GOLDEN


@pytest.fixture(scope="session")
def torch_reads():
    """All tensors of a torch.distributed.checkpoint folder by torch's own loader: the oracle for ours."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    def read(folder: Path) -> dict[str, torch.Tensor]:
        entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()
                 if isinstance(entry, TensorStorageMetadata)}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        return state
    return read


@pytest.fixture(scope="session")
def golden_case():
    """Read a golden case: `.tensors` of NAME.safetensors and `.facts` of NAME.json, where they exist."""
    def read(name: str) -> SimpleNamespace:
        from safetensors.torch import load_file

        tensors, facts = GOLDEN / f"{name}.safetensors", GOLDEN / f"{name}.json"
        return SimpleNamespace(tensors=load_file(tensors) if tensors.exists() else {},
                               facts=json.loads(facts.read_text()) if facts.exists() else {})
    return read


@pytest.fixture(scope="session")
def reference_model(single_rank):
    """Build an HRMModel from a reference config and full reference weights."""
    from hrm_megatron.config import Architecture, ffn_hidden_size
    from hrm_megatron.convert.table import table
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    def build(config: dict, weights: dict, vocab_size: int, **overrides):
        import torch

        h = config["hidden_size"]
        architecture = Architecture(
            num_layers=config["n_layers"] // 2, hidden_size=h, num_attention_heads=config["num_heads"],
            ffn_hidden_size=ffn_hidden_size(h, config["expansion"]), vocab_size=vocab_size,
            h_cycles=config["H_cycles"], l_cycles=config["L_cycles"], norm_placement=config["norm_type"],
            h_norm_placement=config["H_override"].get("norm_type"), init_scheme=config["init_type"],
            init_std=config.get("init_std"))
        model = HRMModel(hrm_config(architecture, **overrides), seed=11)
        places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for entry in table(architecture):
                places[entry.megatron].copy_(entry.to_megatron(weights[entry.native]))
        return model
    return build
