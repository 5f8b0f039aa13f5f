"""Gradients of one step in every layout against one process, tensor by tensor.

The first moment after one step from nothing is (1 - beta1) times the gradient, and a checkpoint holds it whole and by
name, whatever the layout. The rows have padding, and examples whose response is a single token.
"""
import json

import pytest
import torch

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.checkpoint.fsdp_folder import open_run
from tests.rounding import GRADIENTS
from tests.training.conftest import GOLDEN
from tests.training.test_layouts import CP, FSDP2, LAYOUTS, OVERLAP, PP, TP, TWO_PHASES

pytestmark = pytest.mark.ranks
STATE = "optimizer.state.exp_avg."
TOLERANCE = GRADIENTS  # of the largest entry of the tensor: fp32 sums in another order
ROWS = ["--num-layers", 4, "--hidden-size", 48, "--num-attention-heads", 4, "--ffn-hidden-size", 64, "--seq-length", 64,
        "--sampled-data-path", GOLDEN / "sampled", "--train-iters", 1, "--lr", 0, "--min-lr", 0, "--eval-iters", 0]
MEGATRON_FSDP = "--use-megatron-fsdp"
GATED_ACT = ["--recompute-granularity", "selective", "--recompute-modules", "gated_act"]
MORE = {
    "PP 2, 5 micro-batches": (2, [PP, 2, "--global-batch-size", 10]),
    "PP 4": (4, [PP, 4]),
    "PP 4, 5 micro-batches": (4, [PP, 4, "--global-batch-size", 10]),
    "PP 4, two phases, 8 micro-batches": (4, [PP, 4, *TWO_PHASES]),
    "TP 2 x PP 2 + SP, two phases": (4, [TP, 2, PP, 2, "--sequence-parallel", *TWO_PHASES]),
    "TP 2 x PP 4 + SP, two phases": (8, [TP, 2, PP, 4, "--sequence-parallel", *TWO_PHASES]),
    "PP 2 x CP 2, two phases": (4, [PP, 2, CP, 2, *TWO_PHASES]),
    "PP 2, 3 layers by hand": (2, [PP, 2, "--decoder-first-pipeline-num-layers", 3,
                                   "--decoder-last-pipeline-num-layers", 1]),
    "TP 2 x PP 2 + SP, gated_act recomputed": (4, [TP, 2, PP, 2, "--sequence-parallel", *GATED_ACT]),
    "FSDP2, gated_act recomputed": (2, [FSDP2, *GATED_ACT]),
    "Megatron-FSDP, gated_act recomputed": (2, [MEGATRON_FSDP, *GATED_ACT]),
    "FSDP2, whole between forward and backward": (2, [FSDP2, "--torch-fsdp2-no-reshard-after-forward"]),
    "Megatron-FSDP": (2, [MEGATRON_FSDP]),
    "Megatron-FSDP x TP 2 + SP": (4, [MEGATRON_FSDP, TP, 2, "--sequence-parallel"]),
    "Megatron-FSDP, ZeRO-1": (2, [MEGATRON_FSDP, "--data-parallel-sharding-strategy", "optim"]),
    "Megatron-FSDP, ZeRO-2": (2, [MEGATRON_FSDP, "--data-parallel-sharding-strategy", "optim_grads"]),
    "Megatron-FSDP, overlap": (2, [MEGATRON_FSDP, *OVERLAP]),
    "Megatron-FSDP over CP 2": (2, [MEGATRON_FSDP, CP, 2]),
}
ALL = {name: layout for name, layout in {**LAYOUTS, **MORE}.items() if name != "1 process"}
CASES = [(name, bp) for name in ALL for bp in (2, 3, 4, 5, 8)]
# Everything in fp64, where nothing but the order of sums is left. Megatron's optimizer knows tensors by these names,
# and its checkpoints are fp32: so the gradients themselves are kept, or compared, where they are whole.
FP64 = """
import json, os, torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from megatron.training import training
from hrm_megatron import pretrain
from hrm_megatron.model.initialize import shard
stock_float, stock_type, parse, finalize = (torch.Tensor.float, torch.Tensor.type, pretrain.parse_arguments,
                                            training.finalize_model_grads)
torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else stock_float(self)
torch.Tensor.type = lambda self, *dtype, **rest: stock_type(self, *dtype, **rest) if dtype else stock_type(
    self).replace("Double", "Float")

def parse_arguments(*given):
    args = parse(*given)
    args.params_dtype, args.use_distributed_optimizer, args.gradient_accumulation_fusion = torch.float64, False, False
    return args

def keep(model, *rest, **options):
    finalize(model, *rest, **options)
    gradients = {name: p.main_grad for name, p in unwrap_model(model[0]).named_global_parameters()}
    if torch.distributed.get_world_size() == 1:
        torch.save(gradients, ONE)
        return
    one, worst = torch.load(ONE), {}
    for name, p in unwrap_model(model[0]).named_global_parameters():
        whole = one[name]
        tp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
        difference, scale = (gradients[name] - shard(whole, p, *tp)).abs().max().item(), whole.abs().max().item()
        worst[name] = difference / scale if scale else difference
    with open(ONE + os.environ["RANK"], "w") as file:
        json.dump(worst, file)

pretrain.parse_arguments, training.finalize_model_grads = parse_arguments, keep
"""
FP64_TOLERANCE = 1e-13
ALWAYS = [("PP 2, 5 micro-batches", 4), ("PP 4, two phases, 8 micro-batches", 2), ("CP 2 x TP 2 + SP", 5),
          ("TP 2 x PP 2 + SP, gated_act recomputed", 5)]


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
            stored = open_run(find_iteration(folder))
            done[key] = {name: stored.tensor(name) for name in stored.shapes() if name.startswith(STATE)}
        return done[key]
    return of


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case[0]}, bp {case[1]}",
                                               marks=[] if case in ALWAYS else pytest.mark.slow) for case in CASES])
def test_gradients_are_those_of_one_process(first_moments, parity, case):
    name, bp_steps = case
    rows = 10 if 10 in ALL[name][1] else 8
    worst = largest_difference(first_moments(name, bp_steps, rows), first_moments(None, bp_steps, rows), bp_steps)
    parity(f"{name}, bp {bp_steps}: gradients", worst, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("bp_steps", [2, 3, 5])
def test_two_phases_give_the_gradients_of_one_bitwise(first_moments, bp_steps):
    one, two = (first_moments(name, bp_steps, 8) for name in ("PP 2, one phase", "PP 2, two phases, recompute"))
    assert largest_difference(two, one, bp_steps) == 0


@pytest.mark.slow
@pytest.mark.parametrize("bp_steps", [2, 5])
@pytest.mark.parametrize("name", ["TP 2 x PP 2 + SP", "PP 4, two phases, 8 micro-batches", "CP 2 x TP 2 + SP", "DP 2"])
def test_in_fp64_nothing_but_rounding_is_left(launch, parity, tmp_path, name, bp_steps):
    prelude = f"ONE = {str(tmp_path / 'one')!r}\n{FP64}"
    worst = {}
    for ranks, flags in ((1, []), ALL[name]):
        run = launch(*ROWS, "--global-batch-size", 8, "--micro-batch-size", 2, "--bp-min-steps", bp_steps,
                     "--bp-max-steps", bp_steps, *flags, ranks=ranks, prelude=prelude)
        assert run.code == 0, run.output[-5000:]
    for rank in range(ranks):
        worst.update(json.loads((tmp_path / f"one{rank}").read_text()))
    one = torch.load(tmp_path / "one")
    assert worst.keys() == one.keys() and {tensor.dtype for tensor in one.values()} == {torch.float64}
    parity(f"{name}, bp {bp_steps}: gradients in fp64", max(worst.values()), FP64_TOLERANCE)


def largest_difference(ours, one, bp_steps):
    assert ours.keys() == one.keys() and len(one) == 2 * 4 * 4 + 2
    worst = 0.0
    for tensor, wanted in one.items():
        scale = wanted.abs().max().item()
        assert (scale == 0) == (bp_steps == 2 and "embedding" in tensor), tensor
        difference = (ours[tensor] - wanted).abs().max().item()
        worst = max(worst, difference / scale if scale else difference)
    return worst
