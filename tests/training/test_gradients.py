"""Gradients of one step in every layout against one process, tensor by tensor.

The first moment after one step from nothing is (1 - beta1) times the gradient, and a checkpoint holds it whole and by
name, whatever the layout. The rows have padding, and examples whose response is a single token.
"""
import pytest

from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.table import table
from hrm_megatron.training.checkpoint import find_iteration
from tests.training.conftest import GOLDEN
from tests.training.test_layouts import CP, FSDP2, LAYOUTS, OVERLAP, PP, TP, TWO_PHASES

pytestmark = pytest.mark.ranks
TOLERANCE = 2e-6  # of the largest entry of the tensor: fp32 sums in another order
ROWS = ["--num-layers", 4, "--hidden-size", 48, "--num-attention-heads", 4, "--ffn-hidden-size", 64, "--seq-length", 64,
        "--sampled-data-path", GOLDEN / "sampled", "--train-iters", 1, "--lr", 0, "--min-lr", 0, "--eval-iters", 0]
MEGATRON_FSDP = "--use-megatron-fsdp"
MORE = {
    "PP 2, 5 micro-batches": (2, [PP, 2, "--global-batch-size", 10]),
    "PP 4": (4, [PP, 4]),
    "PP 4, 5 micro-batches": (4, [PP, 4, "--global-batch-size", 10]),
    "PP 4, two phases, 8 micro-batches": (4, [PP, 4, *TWO_PHASES]),
    "PP 2, 3 layers by hand": (2, [PP, 2, "--decoder-first-pipeline-num-layers", 3,
                                   "--decoder-last-pipeline-num-layers", 1]),
    "FSDP2, whole between forward and backward": (2, [FSDP2, "--torch-fsdp2-no-reshard-after-forward"]),
    "Megatron-FSDP": (2, [MEGATRON_FSDP]),
    "Megatron-FSDP x TP 2 + SP": (4, [MEGATRON_FSDP, TP, 2, "--sequence-parallel"]),
    "Megatron-FSDP, ZeRO-1": (2, [MEGATRON_FSDP, "--data-parallel-sharding-strategy", "optim"]),
    "Megatron-FSDP, ZeRO-2": (2, [MEGATRON_FSDP, "--data-parallel-sharding-strategy", "optim_grads"]),
    "Megatron-FSDP, overlap": (2, [MEGATRON_FSDP, *OVERLAP]),
    "Megatron-FSDP over CP 2": (2, [MEGATRON_FSDP, CP, 2]),
}
ALL = {name: layout for name, layout in {**LAYOUTS, **MORE}.items() if name != "1 process"}
CASES = [(name, bp) for name in ALL for bp in ((2, 3, 4, 5, 8) if PP in ALL[name][1] else (2, 5))]
ALWAYS = [("PP 2, 5 micro-batches", 4), ("PP 4, two phases, 8 micro-batches", 2), ("CP 2 x TP 2 + SP", 5)]


@pytest.fixture(scope="session")
def first_moments(launch, tmp_path_factory):
    """The first moments after one step by name; once for all tests."""
    done = {}

    def of(name, bp_steps, rows):
        key = name, bp_steps, rows
        if key not in done:
            ranks, flags = ALL[name] if name else (1, [])
            folder = tmp_path_factory.mktemp("gradients")
            run = launch(*ROWS, "--global-batch-size", rows, "--micro-batch-size", 2, "--bp-min-steps", bp_steps,
                         "--bp-max-steps", bp_steps, "--save", folder, *flags, ranks=ranks)
            assert run.code == 0, run.output[-5000:]
            checkpoint = read_megatron(find_iteration(folder))
            done[key] = {entry.megatron: checkpoint.read("exp_avg", entry) for entry in table(checkpoint.architecture)
                         if entry.trained}
        return done[key]
    return of


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case[0]}, bp {case[1]}",
                                               marks=[] if case in ALWAYS else pytest.mark.slow) for case in CASES])
def test_gradients_are_those_of_one_process(first_moments, parity, case):
    name, bp_steps = case
    rows = 10 if 10 in ALL[name][1] else 8
    ours, one = first_moments(name, bp_steps, rows), first_moments(None, bp_steps, rows)
    worst = 0.0
    for tensor, wanted in one.items():
        scale = wanted.abs().max().item()
        assert (scale == 0) == (bp_steps == 2 and "embedding" in tensor), tensor
        difference = (ours[tensor] - wanted).abs().max().item()
        worst = max(worst, difference / scale if scale else difference)
    parity(f"{name}, bp {bp_steps}: gradients", worst, TOLERANCE)
