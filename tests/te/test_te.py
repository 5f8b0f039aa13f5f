"""Transformer Engine's layers in both stacks, on a CPU: its own Python code over a stub of its compiled half.

`make setup` puts its pure Python package into .venv/te-python, out of the way of every import but these; $TE_PYTHON may
name another folder that has it.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.training.conftest import FULLBATCH, scalars

ROOT = Path(__file__).parents[2]
PACKAGE = Path(os.environ.get("TE_PYTHON", Path(sys.prefix) / "te-python"))
ON_HOPPER = ["presets", "spec", "fp32", "fused", "sums", "checkpoints", "delayed", "casts delayed", "casts tensorwise",
             "recast", "layers_in_bf16", "attention", "no_backend", "fp8_parameters", "first_amax", "offloading fp32",
             "offloading fp8", "kept"]
ON_BLACKWELL = ["casts mxfp8"]
RUN = ["--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", 96, "--global-batch-size", 8,
       "--micro-batch-size", 2, "--sampled-data-path", FULLBATCH / "sampled", "--train-iters", 3, "--lr", 4e-3,
       "--lr-warmup-iters", 1, "--bp-min-steps", 5, "--eval-iters", 0, "--log-interval", 1,
       "--attention-kernel", "sdpa"]  # "auto" would take one of the pretended GPU
FP8 = ["--bf16", "--fp8-format", "hybrid", "--fp8-recipe"]
TWO_PHASES = ["--pipeline-model-parallel-size", 2, "--micro-batch-size", 1, "--pipeline-schedule", "two-phase"]


class Probe:
    """tests/te/probe.py on a GPU of this capability."""

    def __init__(self, capability: str, folder: Path) -> None:
        assert (PACKAGE / "transformer_engine").is_dir(), f"{PACKAGE} has no transformer_engine: run `make setup`"
        self.folder, self.asked = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.te.probe", capability], cwd=ROOT, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(PACKAGE)])},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, *words: object, ranks: int = 1) -> list[dict]:
        """What each of so many processes says to these words."""
        self.asked += 1
        port, logs = str(free_port()), [self.folder / f"{self.asked}.{rank}" for rank in range(ranks)]
        assert self.process.stdin and self.process.stdout
        print(json.dumps([dict(words=[*map(str, words)], log=str(log), environment=dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port)) for rank, log in enumerate(logs)]),
            file=self.process.stdin, flush=True)
        codes = json.loads(self.process.stdout.readline())
        said = [log.read_text() for log in logs]
        assert not any(codes), "\n".join(text[-5000:] for code, text in zip(codes, said, strict=True) if code)
        return [json.loads(text.splitlines()[-1]) for text in said]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    probe = Probe("9.0", tmp_path_factory.mktemp("hopper"))
    yield probe
    probe.close()


@pytest.fixture(scope="module")
def claims(hopper, tmp_path_factory):
    """What tests/te/probe.py found, by claim."""
    blackwell = Probe("10.0", tmp_path_factory.mktemp("blackwell"))
    try:
        return {**hopper(*ON_HOPPER)[0], **blackwell(*ON_BLACKWELL)[0]}
    finally:
        blackwell.close()


@pytest.fixture(scope="module")
def train(hopper, tmp_path_factory):
    """Train golden/fullbatch for three steps: losses, and what every rank says, see probe.train."""
    def run(*flags, ranks=1):
        folder = tmp_path_factory.mktemp("te")
        said = hopper("train", *RUN, "--num-workers", 0, "--tensorboard-dir", folder, *flags, ranks=ranks)
        return scalars(folder), said
    return run


@pytest.fixture(scope="module")
def bf16_losses(train):
    losses, said = train("--bf16")
    assert said == [dict(casts=[[], [], []], contexts=0)]
    return losses


def test_every_preset_has_the_weights_of_the_local_spec(claims):
    from hrm_megatron.config import PRESETS

    assert claims["presets"].keys() == PRESETS.keys()
    for preset, (local, te) in claims["presets"].items():
        names = [name for name, *_ in te]
        assert len(names) == len(set(names)) == 2 * 2 * 4 + 2
        assert [row[:3] for row in te] == [row[:3] for row in local], preset
        # Megatron builds embedding and head on a device, whatever the layers do.
        assert all(meta for name, *_, meta in te if "linear" in name), preset


def test_layout_and_checkpoint_see_no_difference(claims):
    local, te = claims["spec"]["local"], claims["spec"]["transformer_engine"]
    assert te.pop("classes") == ["TickColumnParallelLinear", "TickRowParallelLinear"]
    assert "TickColumnParallelLinear" not in local.pop("classes")
    for attributes in (local["attributes"], te["attributes"]):
        assert attributes["h_stack.layers.1.mlp.linear_fc1.weight"][:3] == [True, 0, 2]
    assert te == local


def test_fp32_equals_the_local_spec(claims, parity):
    for what, difference in claims["fp32"].items():
        parity(f"TE over its stub, fp32 {what}", difference, 1e-6)  # the same products, perhaps summed in another order


def test_gradients_of_all_ticks_are_added_up(claims, parity):
    found = dict(claims["fused"])
    stock = found.pop("stock at bp 5")
    for what, difference in found.items():
        parity(f"TE over its stub, gradients that layers add, {what}", difference, 1e-6)
    assert stock > 0.1, "stock layers no longer overwrite: TickLinear.forward may become simpler"


def test_autograd_adds_up_no_gradient_that_a_layer_has_added(claims):
    assert claims["sums"] == dict(bf16=0, fp8=0)


@pytest.mark.parametrize("saved, loaded", [("local", "transformer_engine"), ("transformer_engine", "local")])
def test_checkpoints_are_exchanged_bitwise(claims, saved, loaded):
    assert claims["checkpoints"][f"{saved} to {loaded}"] == []


def test_delayed_scaling_goes_on_where_it_stopped(claims):
    found = claims["delayed"]
    assert found["scale"][:2] != [1, 1]  # input and weight have been seen
    assert all(found["delayed 4"].values()) and found["scores after"] == 0
    assert {name for name, same in found["delayed 8"].items() if same} == {"scaling_fwd.scale", "scaling_bwd.scale"}
    assert found["tensorwise"] is None and found["local"] is None


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "mxfp8"])
def test_a_weight_is_cast_once_a_step(claims, recipe):
    found = claims[f"casts {recipe}"]
    layers = [name for name in found["weights"] if "linear" in name]
    assert len(layers) == 2 * 2 * 4
    assert found["steps"] == [dict.fromkeys(layers, 1)] * 3  # and neither embedding nor head
    # FP8 rounds each element to 2^-4 or 2^-3 of itself: gradients of such small sums point nearly the same way.
    assert 0.9 < found["cosine"] < 1


def test_a_changed_weight_is_cast_anew(claims):
    assert claims["recast"] < 0.05  # e4m3 keeps three bits: 2^-4 of an element, at most


def test_first_and_last_layers_of_each_stack_stay_in_bf16(claims):
    assert claims["layers_in_bf16"] == ["h_stack.layers.1", "l_stack.layers.1"]


def test_attention_takes_no_part_in_the_exchange_of_maxima(claims):
    """Ranks differ in which of its two calls their rows need, and would exchange other numbers."""
    found = claims["attention"]
    assert found["as it is"] == [0, 0, True]
    assert 0 < found["in the region"][0] < found["in the region"][1]  # what it would be


def test_masters_of_fp8_parameters_begin_with_the_drawn_values(claims):
    found = claims["fp8_parameters"]
    assert found["count"] == 2 * 2 * 4
    assert found["master"] == 0 and 0 < found["weight"] < 0.05


def test_delayed_scales_of_fp8_parameters_begin_with_the_drawn_values(claims):
    assert len(claims["first_amax"]) == 2 * 2 * 4
    for name, (seen, own) in claims["first_amax"].items():
        assert seen == pytest.approx(own, rel=2**-8) and own > 0, name  # bf16 of what was drawn in fp32


def test_a_backend_that_is_not_there_is_one_line(claims):
    assert claims["no_backend"].startswith("--attention-backend fused: Transformer Engine finds none for this run (")
    assert claims["no_backend"].endswith("; give --attention-backend auto, or --attention-kernel varlen")


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_activations_come_back_from_the_host(claims, precision):
    found = claims[f"offloading {precision}"]
    assert found["differ"] == []  # bitwise: copies of the same numbers
    assert found["foreign"] == 0  # neither weights nor what all layers share
    made, alive = found["contexts"]
    ticks = sum(int(bp) - int(again) for bp, again, layers in map(str.split, found["bytes"]) if layers == "1")
    assert made == 2 * 3 * ticks > 0 and alive == 0  # one for each micro-batch and tick; gone with its graph
    assert "Invalid state" in found["one context"], "Megatron's own context copes with ticks: layers/offload.py may go"


def test_what_a_layer_keeps_is_copied_once(claims):
    copied = claims["offloading fp32"]["bytes"]
    of_a_layer = copied["5 0 1"] // (2 * 5)
    assert copied == {key: 2 * (ticks - again) * layers * of_a_layer for key in copied
                      for ticks, again, layers in [map(int, key.split())]}
    state = 64 * 64 * 4  # bytes of [s, b, h]; an FFN is 1.5 times as wide
    print(f"a layer keeps {of_a_layer / state:.2f} states in host memory")
    assert of_a_layer >= 8 * state  # at least the results of both norms and, of the MLP, input, activation and product


def test_what_a_layer_of_XL_keeps_on_a_gpu(claims):
    from hrm_megatron.config import PRESETS, Architecture
    from hrm_megatron.planner.memory import layer_states

    sizes, found = PRESETS["XL"], claims["kept"]
    ffn = sizes.ffn_hidden_size / sizes.hidden_size
    for dropped, states in found.items():
        megabytes = states * sizes.hidden_size * 2 * sizes.num_layers / 1e6
        print(f"gated_act recomputed: {dropped:5}  {states:.2f} states, {megabytes:.2f} MB a position and tick")
    architecture = Architecture(sizes.num_layers, sizes.hidden_size, sizes.num_attention_heads,
                                sizes.ffn_hidden_size, 65_536)
    # Keys and values of prefixes are there twice, in 0.2 to 0.35 of the positions of this row; sums are small.
    assert found["False"] == pytest.approx(layer_states(architecture), abs=0.25)
    assert found["False"] - found["True"] == pytest.approx(1 + ffn, abs=1e-6)
    assert found["True"] == pytest.approx(layer_states(architecture, gated_act=True), abs=0.25)


def test_offloading_trains_by_command_line(train, bf16_losses):
    losses, said = train("--bf16", "--cpu-offloading-num-layers", 1, "--recompute-ticks", 2)
    assert losses == bf16_losses
    assert said[0]["contexts"] == 3 * 4 * (5 - 2)  # steps, micro-batches, ticks with a graph


def test_bf16_training_follows_the_local_spec(launch, bf16_losses, parity, tmp_path):
    run = launch(*RUN, "--bf16", "--tensorboard-dir", tmp_path)
    assert run.code == 0 and "layers: Megatron's local ones: Transformer Engine needs a CUDA device" in run.output
    losses = scalars(tmp_path)
    assert losses.keys() == bf16_losses.keys() == {1, 2, 3}
    # Products and attention round to bf16 in other places: 2^-9 of a loss of about 5.
    parity("TE over its stub, bf16: 3 losses", max(abs(losses[s] - bf16_losses[s]) for s in losses), 1e-2)


@pytest.mark.parametrize("name, flags, ranks, per_rank", [
    pytest.param("one process", [], 1, 16, id="one"),
    pytest.param("PP 2, two phases", TWO_PHASES, 2, 8, id="pp", marks=pytest.mark.ranks),
    pytest.param("DP 2, delayed", ["--fp8-recipe", "delayed"], 2, 16, id="delayed",
                 marks=[pytest.mark.ranks, pytest.mark.slow]),
    pytest.param("TP 2", ["--tensor-model-parallel-size", 2], 2, 16, id="tp",
                 marks=[pytest.mark.ranks, pytest.mark.slow]),
    pytest.param("DP 2, FP8 parameters", ["--fp8-param-gather"], 2, 0, id="parameters", marks=pytest.mark.ranks),
])
def test_fp8_training_casts_once_a_step_and_stays_near_bf16(train, bf16_losses, parity, name, flags, ranks, per_rank):
    losses, said = train(*FP8, "tensorwise", *flags, ranks=ranks)
    assert said == [dict(casts=[[1] * per_rank] * 3, contexts=0)] * ranks
    worst = max(abs(losses[step] - bf16_losses[step]) / bf16_losses[step] for step in bf16_losses)
    parity(f"TE over its stub, FP8 of bf16's loss, {name}", worst, 0.02)


@pytest.mark.slow
def test_delayed_scaling_is_resumed_bitwise(train, tmp_path):
    whole, _ = train(*FP8, "delayed", "--save", tmp_path / "saved", "--save-interval", 2)
    resumed, _ = train(*FP8, "delayed", "--load", tmp_path / "saved", "--ckpt-step", 2)
    assert resumed == {3: whole[3]}
