"""The model against numbers that HRM-Text itself produced, in fp32 on a CPU."""
import functools

import pytest
import torch
import torch.nn.functional as F

from hrm_megatron.convert.table import table
from hrm_megatron.data.batch import PackedBatch
from tests.model.exact import Exact
from tests.rounding import ORDERS, REFERENCE_GRADIENTS, REFERENCE_STATES

# The reference's numbers are fp32 and so are ours: both are judged by the same formulas in fp64. The reference is a
# file, so its rounding is the same on every machine; another formula is off by 1e-2. Post-norm divides the errors of
# its sums by their norm again at every tick.
REFERENCE_POST_NORM = 1e-5
ROWS = dict(tokens="inputs", labels="labels", position_ids="position_ids", prefix_lengths="prefix_lens",
            response_lengths="causal_lens")


def seen(case):
    """The tensors of a case, examples of a causal one as a prefix of one token and responses."""
    if case.facts["config"].get("attn_type") != "causal":
        return case.tensors
    p, r = case.tensors["prefix_lens"], case.tensors["causal_lens"]
    return case.tensors | dict(prefix_lens=p.clamp(max=1), causal_lens=p + r - p.clamp(max=1))


def batch_of(tensors, prefix=""):
    return PackedBatch.from_rows({ours: tensors[prefix + theirs].long()[None] for ours, theirs in ROWS.items()})


@pytest.fixture(scope="module")
def build(golden_case, reference_model):
    def build(case, **overrides):
        config = golden_case(case).facts["config"]
        return reference_model(config, golden_case("init_hrm").tensors, config["vocab_size"], **overrides)
    return build


@pytest.fixture(scope="module")
def exact(golden_case):
    """The states and logits of a case in fp64: `exact(case)`."""
    @functools.cache
    def of(case):
        want, weights = golden_case(case), golden_case("init_hrm").tensors
        model = Exact(want.facts["config"], weights)
        with torch.no_grad():
            found = model.states(*exact_inputs(seen(want)))
            return found | {"logits": model.logits(found[f"tick{len(found) - 2:02d}.z_H"])}
    return of


def exact_inputs(tensors):
    return tensors["inputs"].long(), tensors["position_ids"].long(), batch_of(tensors).lengths[0]


def hold(parity, what, triples, of_reference):
    """Hold errors against the formula, of the reference and of ours, for all (ours, reference, exact)."""
    errors = [[(t.double() - exact).abs().max().item() for t in (theirs, ours)] for ours, theirs, exact in triples]
    rounding = max(unit for unit, _ in errors)
    parity(f"{what}: rounding of the reference", rounding, of_reference)
    parity(f"{what}: error of ours in that unit", max(
        error / unit if error else 0 for unit, error in errors), ORDERS)
    return rounding


@pytest.mark.parametrize("kernel", ["dense", "sdpa", "cpu"])
@pytest.mark.parametrize("case", ["forward_pre", "forward_post", "forward_H_post_L_pre", "forward_fixed_normal",
                                  "forward_megatron", "forward_causal"])
def test_logits_and_states_equal_the_reference(golden_case, build, exact, parity, case, kernel):
    want, model, states = golden_case(case), build(case, attention_kernel=kernel), {}
    batch = batch_of(seen(want))
    with torch.no_grad():
        z_h = model.states(batch, record=lambda name, tensor: states.update({name: tensor[:, 0].clone()}))
        states["logits"] = model.logits_at(z_h, torch.arange(z_h.shape[0]))
        scores = model(batch=batch)
    live = want.tensors["position_ids"] >= 0
    recorded = {name for name in want.tensors if name.startswith("tick") or name in ("embedding_out", "logits")}
    assert len(recorded) == (2 + 2 * (3 + 1) if case in ("forward_pre", "forward_post") else 2)
    rounding = hold(parity, f"{case}, {kernel}", [
        [each[name][live] for each in (states, want.tensors, exact(case))] for name in sorted(recorded)],
        REFERENCE_POST_NORM if "post" in case else REFERENCE_STATES)
    assert [scores[1].sum().item(), scores.shape[1]] == want.facts["metrics"]["accuracy"]
    labels = want.tensors["labels"].long()
    losses = F.cross_entropy(exact(case)["logits"], labels, ignore_index=-100, reduction="none")[labels >= 0]
    for each in (scores[0], want.tensors["token_loss"][labels >= 0]):
        # A loss is the difference of two of what moves by no more than the logits do.
        assert (each - losses).abs().max() < 2 * ORDERS * rounding


@pytest.mark.parametrize("bp_steps", [2, 3, 4, 5])
def test_gradients_equal_the_reference(golden_case, build, parity, bp_steps):
    model, want = build("forward_pre"), golden_case(f"grads_bp{bp_steps}").tensors
    case = golden_case("forward_pre")
    losses = model(batch=batch_of(case.tensors), bp_steps=bp_steps)[0]
    losses.mean().backward()
    exact = Exact(case.facts["config"], golden_case("init_hrm").tensors)
    logits = exact.logits(exact.states(*exact_inputs(case.tensors), bp_steps)["tick07.z_H"])
    F.cross_entropy(logits, case.tensors["labels"].long(), ignore_index=-100).backward()
    parameters, triples = dict(model.named_parameters()), []
    for entry in table(model.config.arch):
        if not entry.trained:
            continue
        gradient = parameters[entry.megatron].grad
        if entry.native not in want:
            assert gradient is None, f"{entry.native} has no gradient in the reference"
            continue
        formula = exact.weights[entry.native].grad
        triples.append([t / formula.abs().max() for t in (entry.from_megatron(gradient), want[entry.native], formula)])
    hold(parity, f"gradients at bp {bp_steps}", triples, REFERENCE_GRADIENTS)
    assert ("embed_tokens.embedding_weight" in want) == (bp_steps > 2)


def test_rows_never_looked_up_have_exactly_no_gradient(golden_case, build):
    # AdamATan2 turns any noise into a full-size step.
    model, batch = build("forward_pre"), batch_of(golden_case("forward_pre").tensors)
    model(batch=batch, bp_steps=5)[0].mean().backward()
    gradient = model.embedding.word_embeddings.weight.grad
    unseen = torch.ones(gradient.shape[0], dtype=torch.bool)
    unseen[batch.tokens.unique()] = False
    assert unseen.sum() > 100
    assert (gradient[unseen] == 0).all()
    assert (gradient[~unseen].abs().sum(1) > 0).sum() >= (~unseen).sum() - 1  # all but the padding token's


@pytest.mark.parametrize("mode", ["lecun_normal", "fixed_normal", "fixed_normal@init_std=0.05", "megatron",
                                  "megatron@init_std=0.03"])
def test_initial_weights_have_the_reference_statistics(golden_case, single_rank, mode):
    from hrm_megatron.config import Architecture
    from hrm_megatron.model.initialize import draw, std_of

    facts = golden_case("init_std").facts["modes"][mode]
    weights = {name: info["shape"] for name, info in facts["params"].items()}
    h = weights["embed_tokens.embedding_weight"][1]
    ffn = weights["model.H_level.core.layers.0.mlp.down_proj.weight"][1]
    layers = sum("H_level" in name and "o_proj" in name for name in weights)
    architecture = Architecture(layers, h, 2, ffn, 256, init_scheme=facts["init_type"], init_std=facts["init_std"])
    assert architecture.embedding_scale == pytest.approx(facts["embedding_scale"], rel=1e-12)
    for entry in table(architecture):
        if entry.trained:
            want = facts["params"][entry.native]
            assert std_of(entry.megatron, architecture) == pytest.approx(want["std"], rel=1e-12), entry.native
            drawn = draw(7, entry.megatron, entry.shape) * want["std"]
            # The standard deviation of an estimate from n draws is about std / sqrt(2 n): five of them.
            assert drawn.std().item() == pytest.approx(want["std"], rel=5 / (2 * drawn.numel()) ** 0.5)
            # fmod(., 3) bounds every draw.
            assert drawn.abs().max() <= 3 * 1.014762601732121 * want["std"] * (1 + 1e-6)
