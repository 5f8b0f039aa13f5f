"""Transformer, Universal Transformer, RINS and both TRMs against numbers that HRM-Text's own networks produced."""
import pytest
import torch

from hrm_megatron.config import PRESETS, Architecture, ConfigError
from hrm_megatron.convert.native_recurrence import read_recurrence
from hrm_megatron.convert.table import table
from hrm_megatron.model.ticks import ticks_of, trains_embedding, unroll
from hrm_megatron.model_types import HRM, MODEL_TYPES
from hrm_megatron.planner.flops import training_flops
from tests.model.baselines import NETS, architecture_of, filled
from tests.model.test_golden import batch_of
from tests.rounding import ORDERS, REFERENCE_GRADIENTS, REFERENCE_STATES

# What the reference rounds, and as much as another order of the same sums does: both below the 1e-5 that is demanded.
STATES, GRADIENTS = (1 + ORDERS) * REFERENCE_STATES, (1 + ORDERS) * REFERENCE_GRADIENTS


@pytest.fixture
def case(golden_case):
    def of(net):
        return golden_case(f"baseline_{net}").tensors, golden_case("baselines").facts[net]
    return of


def test_every_baseline_has_its_golden_case(golden_case):
    facts = golden_case("baselines").facts
    assert {read_recurrence(each["config"]).model_type for each in facts.values()} == set(MODEL_TYPES) - {HRM}
    assert tuple(facts) == NETS == tuple(MODEL_TYPES)[1:]


@pytest.mark.parametrize("kernel", ["dense", "sdpa", "cpu"])
@pytest.mark.parametrize("net", NETS)
def test_logits_and_states_equal_the_reference(single_rank, golden_case, case, parity, net, kernel):
    want, facts = case(net)
    model, states = filled(architecture_of(facts["config"]), want, attention_kernel=kernel), {}
    batch = batch_of(golden_case("forward_pre").tensors)
    with torch.no_grad():
        last = model.states(batch, record=lambda name, tensor: states.update({name: tensor[:, 0].clone()}))
        states["logits"] = model.logits_at(last, torch.arange(last.shape[0]))
        losses = model(batch=batch)[0]
    # The reference has one stack in TRM and calls all of its states z_L, whichever it replaces.
    ticks = {f"out.tick{i:02d}.{'z_L' if len(model.config.arch.kind.stacks) == 1 else f'z_{tick.writes}'}":
             states[f"tick{i:02d}.z_{tick.writes}"] for i, tick in enumerate(ticks_of(model.config.arch))}
    if net == "transformer":  # of which only the end was noted
        ticks = {}
    ours = ticks | {f"out.{name}": states[name] for name in ("embedding_out", "logits")}
    assert ours.keys() == {name for name in want if name.startswith("out.")} - {"out.token_loss"}
    parity(f"{net}, {kernel}: states and logits", max((ours[name] - want[name]).abs().max().item() for name in ours),
           STATES)
    # A loss is the difference of two of what moves by no more than the logits do.
    parity(f"{net}, {kernel}: losses", (losses - want["out.token_loss"][batch.labels[0] >= 0]).abs().max().item(),
           2 * STATES)


@pytest.mark.parametrize("net", NETS)
def test_gradients_equal_the_reference(single_rank, golden_case, case, parity, net):
    want, facts = case(net)
    architecture = architecture_of(facts["config"])
    model = filled(architecture, want)
    bp_steps = read_recurrence(facts["config"]).bp[1]
    model(batch=batch_of(golden_case("forward_pre").tensors), bp_steps=bp_steps)[0].mean().backward()
    parameters, worst = dict(model.named_parameters()), 0.0
    for entry in table(architecture):
        if not entry.trained:
            continue
        have = parameters[entry.megatron].grad
        assert (have is None) == (entry.native in facts["grads_none"]), entry.native
        if have is not None:
            theirs = want[f"grad.{entry.native}"]
            worst = max(worst, ((entry.from_megatron(have) - theirs).abs().max() / theirs.abs().max()).item())
    parity(f"{net}: gradients", worst, GRADIENTS)
    assert trains_embedding(ticks_of(architecture, bp_steps)) == (not facts["grads_none"])


def test_an_architecture_is_its_list_of_ticks():
    def spelled(model_type, **cycles):
        kind = MODEL_TYPES[model_type]
        return " ".join(f"{tick.writes}={tick.stack}({'+'.join(tick.reads)}){'*' * tick.with_grad}" for tick in unroll(
            cycles.get("h", kind.h_cycles), cycles.get("l", kind.l_cycles), kind.bp_steps[1], model_type=model_type))
    assert spelled("hrm") == ("L=L(L+H) L=L(L+H) L=L(L+H) H=H(L+H)* L=L(L+H)* L=L(L+H)* L=L(L+H)* H=H(L+H)*")
    assert spelled("transformer") == "H=L(H)*"
    assert spelled("ut") == "L=L(L+H) L=L(L+H) L=L(L+H)* L=L(L+H)*"
    assert spelled("rins", l=5) == "L=L(L+H) L=L(L+H)* L=L(L+H)* L=L(L+H)* L=L(L+H)* H=H(L)*"
    assert spelled("trm") == "L=L(L+H) H=L(L+H) L=L(L+H)* H=L(L+H)*"
    assert spelled("trm_match_recurrence") == spelled("hrm").replace("=H(", "=L(")


@pytest.mark.parametrize(("model_type", "bp_steps", "way_out"), [
    ("transformer", 2, "choose 1"), ("ut", 5, "choose 1 to 4"), ("ut", 0, "choose 1 to 4"),
    ("rins", 1, "choose 2 to 8"), ("trm", 5, "choose 2 to 4")])
def test_impossible_gradient_ticks_are_refused(model_type, bp_steps, way_out):
    kind = MODEL_TYPES[model_type]
    with pytest.raises(ConfigError, match=f"bp_steps={bp_steps} does not fit .*{way_out}"):
        unroll(kind.h_cycles, kind.l_cycles, bp_steps, model_type=model_type)


@pytest.mark.parametrize(("model_type", "changed"), [("transformer", dict(h_cycles=2, l_cycles=1)),
                                                     ("ut", dict(h_cycles=3)), ("rins", dict(h_cycles=2))])
def test_cycles_without_a_meaning_are_refused(model_type, changed):
    name, value = next(iter(changed.items()))
    with pytest.raises(ConfigError, match=rf"{name}={value}: .*model_type={model_type}.*or give 1"):
        Architecture(2, 24, 3, 40, 250, model_type=model_type, **{"h_cycles": 1, "l_cycles": 1} | changed)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "XXL_wide"])
def test_presets_have_the_reference_parameters(golden_case, model_type, size):
    want = golden_case("presets").facts["sizes"][size]["by_net"][model_type]
    architecture = PRESETS[size].architecture(model_type=model_type)
    assert (architecture.num_layers, architecture.num_parameters) == (want["layers_per_stack"], want["parameters"])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_flops_are_those_of_the_layers_that_run(model_type):
    """By hand: layers forward, and twice as many backward; XL at the last gradient ticks."""
    layers = {"hrm": (128, 80), "transformer": (32, 32), "ut": (128, 64), "rins": (128, 80), "trm": (128, 64),
              "trm_match_recurrence": (128, 80)}[model_type]
    xl = PRESETS["XL"].architecture(model_type=model_type)
    assert xl.num_ticks * xl.num_layers == layers[0]
    by_hand = (layers[0] + 2 * layers[1]) * 2 * xl.layer_parameters + 6 * xl.hidden_size * xl.padded_vocab_size
    assert training_flops(xl, MODEL_TYPES[model_type].bp_steps[1], 1, 1) == by_hand
