"""HRM-Text's baselines by command line: layouts, resuming, conversions and answers."""

import re

import pytest
import torch

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.checkpoint.fsdp_folder import open_run
from hrm_megatron.config import ConfigError
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.native import read_native
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.convert.table import table
from hrm_megatron.model_types import HRM, MODEL_TYPES
from tests.rounding import GRADIENTS
from tests.training.conftest import FULLBATCH
from tests.training.test_gradients import ROWS, STATE
from tests.training.test_layouts import PP, TP, TWO_PHASES

pytestmark = pytest.mark.ranks
# An FFN that HRM-Text can build.
STEP = [*ROWS, "--ffn-hidden-size", 256, "--global-batch-size", 8, "--micro-batch-size", 2]
BASELINES = [name for name in MODEL_TYPES if name != HRM]
LAYOUTS = {"TP 2 + SP": (2, [TP, 2, "--sequence-parallel"]), "PP 2": (2, [PP, 2]),
           "PP 2, two phases": (2, [PP, 2, *TWO_PHASES])}
# Each baseline under TP 2 and PP 2, and in two phases what parks other states than an HRM does.
ALWAYS = [("trm", "TP 2 + SP"), ("transformer", "PP 2"), ("rins", "PP 2, two phases")]
CASES = [*ALWAYS, *(pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.ranks]) for case in (
    *((name, layout) for layout in ("TP 2 + SP", "PP 2") for name in BASELINES),
    *((name, "PP 2, two phases") for name in ("ut", "trm"))) if case not in ALWAYS)]


@pytest.fixture(scope="session")
def stepped(launch, tmp_path_factory):
    """The folder of a run of one step, once for all tests; its first moments are (1 - beta1) times the gradients."""
    done = {}

    def of(model_type, layout=None):
        if (model_type, layout) not in done:
            ranks, flags = LAYOUTS[layout] if layout else (1, [])
            folder = tmp_path_factory.mktemp("baseline")
            run = launch(*STEP, "--model-type", model_type, "--save", folder, *flags, ranks=ranks)
            assert run.code == 0, run.output[-5000:]
            done[model_type, layout] = folder, run
        return done[model_type, layout]
    return of


@pytest.mark.parametrize(("model_type", "layout"), CASES)
def test_gradients_are_those_of_one_process(stepped, parity, model_type, layout):
    ours, one = (open_run(find_iteration(stepped(model_type, each)[0])) for each in (layout, None))
    names = {name for name in one.shapes() if name.startswith(STATE)}
    assert names == {name for name in ours.shapes() if name.startswith(STATE)}
    assert len(names) == 4 * 4 * len(MODEL_TYPES[model_type].stacks) + 2
    worst = 0.0
    for name in names:
        want = one.tensor(name)
        scale = want.abs().max().item()
        # Of the defaults TRM's alone leave the embedding without a gradient.
        assert (scale == 0) == (model_type == "trm" and "embedding" in name), name
        worst = max(worst, (ours.tensor(name) - want).abs().max().item() / (scale or 1.0))
    parity(f"{model_type}, {layout}: gradients", worst, GRADIENTS)


@pytest.mark.parametrize("model_type", BASELINES)
def test_a_run_says_what_it_trains(stepped, model_type):
    kind = MODEL_TYPES[model_type]
    assert f"model: {kind.title} of " in stepped(model_type)[1].output
    assert read_megatron(find_iteration(stepped(model_type)[0])).architecture.model_type == model_type


def test_another_type_does_not_go_on_from_it(stepped, launch):
    folder, _ = stepped("trm_match_recurrence")
    run = launch(*STEP, "--load", folder, "--train-iters", 2)
    (error,) = run.errors
    assert run.code == 2 and "its model has model_type=trm_match_recurrence, the command line makes hrm" in error


@pytest.mark.parametrize("model_type", BASELINES)
def test_conversions_to_native_and_back_are_bitwise(stepped, tmp_path, model_type):
    folder, _ = stepped(model_type)
    convert(Conversion(folder, "megatron", tmp_path / "native", "native"))
    convert(Conversion(tmp_path / "native", "native", tmp_path / "back", "megatron"))
    start, native, back = (read_megatron(find_iteration(folder)), read_native(tmp_path / "native"),
                           read_megatron(find_iteration(tmp_path / "back")))
    assert start.architecture.model_type == native.architecture.model_type == model_type
    assert (start.training.bp_min_steps, start.training.bp_max_steps) == (
        native.training.bp_min_steps, native.training.bp_max_steps)
    for entry in table(start.architecture):
        for part in start.parts if entry.trained else ["raw"]:
            assert torch.equal(native.read(part, entry), start.read(part, entry))
            assert torch.equal(back.read(part, entry), start.read(part, entry))


@pytest.mark.parametrize("model_type", BASELINES)
def test_native_names_are_the_references(golden_case, stepped, model_type):
    from hrm_megatron.convert.native_recurrence import write_recurrence

    checkpoint = read_megatron(find_iteration(stepped(model_type)[0]))
    want = golden_case("baselines").facts[model_type]["config"]
    ours = write_recurrence(checkpoint.architecture, checkpoint.training)
    sizes = {"n_layers"}
    assert {name: value for name, value in ours.items() if name not in sizes} == {
        name: value for name, value in want.items() if name in ours and name not in sizes} | (
            {"half_layers": False} if model_type == "trm" else {})
    golden = {name.removeprefix("param.").replace(".1.", ".0.") for name in golden_case(
        f"baseline_{model_type}").tensors if name.startswith("param.")}
    names = {entry.native for entry in table(checkpoint.architecture)}
    assert golden <= names and len(names) == len(golden) + 3 * 4 * len(MODEL_TYPES[model_type].stacks)


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_formats_that_have_no_such_model_are_refused(stepped, tmp_path, target):
    with pytest.raises(ConfigError, match="a RINS, which (transformers' HrmText|llama.cpp) does not have") as error:
        convert(Conversion(stepped("rins")[0], "megatron", tmp_path / "out", target))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_warm_up_that_the_format_cannot_say_is_refused(launch, tmp_path):
    run = launch(*STEP, "--model-type", "ut", "--bp-min-steps", 1, "--bp-max-steps", 4, "--save", tmp_path / "run")
    assert run.code == 0, run.output[-3000:]
    with pytest.raises(ConfigError, match="bp_steps rise from 1 to 4, but HRM-Text's Universal Transformer has no"):
        convert(Conversion(tmp_path / "run", "megatron", tmp_path / "native", "native"))


@pytest.mark.parametrize("model_type", BASELINES)
def test_cached_logits_equal_the_training_codes(single_rank, parity, model_type):
    from hrm_megatron.config import Architecture
    from hrm_megatron.generate.decode import decoder_of
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config
    from tests.generate.test_decoder import worst_difference
    from tests.model.test_transformers import TOLERANCE

    kind = MODEL_TYPES[model_type]
    model = HRMModel(hrm_config(Architecture(2, 40, 5, 24, 250, kind.h_cycles, kind.l_cycles, model_type=model_type)),
                     seed=3).eval()
    parity(f"{model_type}: cached logits", worst_difference(model, decoder_of(model, 128)), TOLERANCE)


MATCHED = ["--sampled-data-path", FULLBATCH / "sampled", "--seq-length", 96, "--global-batch-size", 8,
           "--micro-batch-size", 2, "--eval-iters", 0, "--dry-run"]


@pytest.mark.parametrize(("model_type", "fewest"), [("transformer", 3 * 0.9), ("rins", 0.9)])
def test_flops_of_a_preset_are_matched_by_steps(launch, model_type, fewest):
    run = launch(*MATCHED, "--model-type", model_type, "--match-flops-of", "B", "--train-iters", 400)
    assert run.code == 0, run.output[-3000:]
    budget, cost, off, steps = re.search(r"an HRM of B takes (\S+) for 400 steps; this .* (\S+) \((\S+)%\) for (\d+)",
                                         run.output).groups()
    assert abs(float(off)) <= 1 and float(cost) == pytest.approx(float(budget), rel=0.01)
    # A Transformer runs and trains a third of the layers of HRM at its last gradient ticks, RINS as many; HRM begins
    # with fewer, a twentieth of its FLOPs over the run.
    assert fewest * 400 < int(steps) < fewest / 0.9 * 400
    assert f"{steps} steps of 8 rows" in run.output  # is what the run plans


@pytest.mark.parametrize(("flags", "parts"), [
    (["--train-iters", 5], ["of the FLOPs to match", "give more --train-iters"]),
    (["--train-iters", 400, "--hrm-preset", "L"], ["takes the sizes of that preset, and --hrm-preset L"]),
    (["--train-iters", 400, "--skip-train"], ["is incompatible with --skip-train"])])
def test_flops_that_cannot_be_matched_are_refused(launch, flags, parts):
    run = launch(*MATCHED, "--model-type", "ut", "--match-flops-of", "B", *flags)
    (error,) = run.errors
    assert run.code == 2 and all(part in error for part in parts), error
