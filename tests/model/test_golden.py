"""The model against numbers that HRM-Text itself produced, in fp32 on a CPU."""
import pytest
import torch

from hrm_megatron.convert.table import table
from hrm_megatron.data.batch import PackedBatch

# Another order of fp32 operations moves logits and states by up to 1e-5 in post-norm (golden README: 1.1e-5 seen
# there for an independent implementation; ours stays below), gradients by 1.1e-6 of the largest element.
STATE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5
ROWS = dict(tokens="inputs", labels="labels", position_ids="position_ids", prefix_lengths="prefix_lens",
            response_lengths="causal_lens")


def batch_of(tensors, prefix=""):
    return PackedBatch.from_rows({ours: tensors[prefix + theirs].long()[None] for ours, theirs in ROWS.items()})


@pytest.fixture(scope="module")
def build(golden_case, reference_model):
    def build(case, **overrides):
        config = golden_case(case).facts["config"]
        return reference_model(config, golden_case("init_hrm").tensors, config["vocab_size"], **overrides)
    return build


@pytest.mark.parametrize("kernel", ["dense", "sdpa", "cpu"])
@pytest.mark.parametrize("case", ["forward_pre", "forward_post", "forward_H_post_L_pre", "forward_fixed_normal",
                                  "forward_megatron"])
def test_logits_and_states_equal_the_reference(golden_case, build, case, kernel):
    want, model, states = golden_case(case), build(case, attention_kernel=kernel), {}
    batch = batch_of(want.tensors)
    with torch.no_grad():
        z_h = model.states(batch, record=lambda name, tensor: states.update({name: tensor.clone()}))
        logits = model.logits_at(z_h, torch.arange(z_h.shape[0]))
        scores = model(batch=batch)
    assert (logits - want.tensors["logits"]).abs().max() < STATE_TOLERANCE
    assert scores[0].sum().item() == pytest.approx(want.facts["loss_sum"], rel=1e-6)
    assert [scores[1].sum().item(), scores.shape[1]] == want.facts["metrics"]["accuracy"]
    recorded = {name for name in want.tensors if name.startswith("tick") or name == "embedding_out"}
    if case in ("forward_pre", "forward_post"):
        assert len(recorded) == 9  # 2 * (3 + 1) ticks and the embedding
    live = want.tensors["position_ids"] >= 0
    for name in recorded:
        assert (states[name][live, 0] - want.tensors[name][live]).abs().max() < STATE_TOLERANCE, name


@pytest.mark.parametrize("bp_steps", [2, 3, 4, 5])
def test_gradients_equal_the_reference(golden_case, build, bp_steps):
    model, want = build("forward_pre"), golden_case(f"grads_bp{bp_steps}").tensors
    losses = model(batch=batch_of(golden_case("forward_pre").tensors), bp_steps=bp_steps)[0]
    losses.mean().backward()
    parameters = dict(model.named_parameters())
    for entry in table(model.config.arch):
        if not entry.trained:
            continue
        gradient = parameters[entry.megatron].grad
        if entry.native not in want:
            assert gradient is None, f"{entry.native} has no gradient in the reference"
            continue
        error = (entry.from_megatron(gradient) - want[entry.native]).abs().max() / want[entry.native].abs().max()
        assert error < GRADIENT_TOLERANCE, entry.native
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
