"""Attention in two calls over all rows: the calls, what they compute and share, what they ask of libraries."""
import contextlib
import inspect
import random
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from hrm_megatron.attention.prefix_lm import PrefixSequences
from hrm_megatron.attention.rotary import Rotation
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.parallel.context import context_positions, context_spans
from tests.attention import stand_ins
from tests.attention.plain_attention import attend
from tests.rounding import ORDERS

HEADS, D, ROW_TOKENS = 3, 8, 36
PACKINGS = 48


def packing(seed):
    """Random rows: examples of one token, empty responses, padding, now and then a row that is full or has nothing."""
    draw = random.Random(seed)
    rows = []
    for _ in range(draw.randint(1, 3)):
        left, pairs = ROW_TOKENS - draw.choice((0, 1, 9)), []
        while left and draw.random() < 0.9:
            p = draw.choice((1, draw.randint(1, left)))
            r = draw.choice((0, left - p, draw.randint(0, left - p)))
            pairs.append((p, r))
            left -= p + r
        rows.append(pairs)
    return rows


def attention(name, **overrides):
    from hrm_megatron.attention.core import KERNELS, VarlenAttention
    from hrm_megatron.attention.varlen import plain_varlen
    from hrm_megatron.transformer_config import hrm_config

    config = hrm_config(Architecture(1, HEADS * D, HEADS, 16, 250), **overrides)
    built = (KERNELS | {"plain": VarlenAttention})[name](
        config, layer_number=1, attn_mask_type=None, attention_type="self", softmax_scale=config.softmax_scale)
    if name == "plain":
        built.primitive = plain_varlen
    return built


def outputs_and_gradients(layer, q, k, v, probe, sequences):
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = layer.attend(*leaves, sequences)
    return [out, *torch.autograd.grad((out * probe).sum(), leaves)]


def difference(have, want):
    return max((a - b).abs().max().item() for a, b in zip(have, want, strict=True))


def test_the_packings_have_every_edge():
    rows = [row for seed in range(PACKINGS) for row in packing(seed)]
    pairs = [pair for row in rows for pair in row]
    assert {(p == 1, r == 0) for p, r in pairs} == {(True, True), (True, False), (False, True), (False, False)}
    assert {sum(map(sum, row)) for row in rows} >= {0, ROW_TOKENS, ROW_TOKENS - 1}
    assert any(row and not any(r for _, r in row) for row in rows)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("bucketed", [False, True])
def test_random_packings_equal_the_definition(single_rank, parity, ranks, bucketed):
    """In fp64, over all context ranks one after the other: their outputs are slices, gradients of keys add up."""
    worst = 0.0
    for seed in range(PACKINGS):
        lengths = packing(seed)
        generator = torch.Generator().manual_seed(seed)
        q, k, v, probe = (torch.randn(ROW_TOKENS, len(lengths), HEADS, D, generator=generator, dtype=torch.float64)
                          for _ in range(4))
        probe = probe.flatten(2)
        overrides = dict(softmax_scale=0.7) if seed % 2 else {}
        want = outputs_and_gradients(attention("dense", **overrides), q, k, v, probe,
                                     PrefixSequences(lengths, None, ROW_TOKENS))
        layer = attention("plain", **overrides)
        layer.bucketed = bucketed
        have = [torch.zeros_like(t) for t in want]
        for rank in range(ranks):
            positions = context_positions(ROW_TOKENS, rank, ranks)
            spans = context_spans(ROW_TOKENS, rank, ranks) if ranks > 1 else None
            out, dq, dk, dv = outputs_and_gradients(layer, q[positions], k, v, probe[positions],
                                                    PrefixSequences(lengths, None, ROW_TOKENS, spans))
            have[0][positions], have[1][positions] = out.detach(), dq
            have[2] += dk
            have[3] += dv
        worst = max(worst, difference(have, want))
    # Sums of at most 36 terms around 1, in another order: some 1e-15 each.
    parity(f"{PACKINGS} packings in two calls, CP {ranks}{', bucketed' if bucketed else ''}", worst, 2e-14)


def calls(lengths, row_tokens, bucketed=False, spans=None):
    from hrm_megatron.attention.varlen import varlen_calls

    return varlen_calls(PrefixSequences(lengths, None, row_tokens, spans), torch.device("cpu"), bucketed)


def plain(call):
    """The call's fields, with rows as a list, or as a run."""
    found = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(call).items()}
    return found | {name: (value.run or value.index.tolist(), not value.parts) for name, value in vars(call).items()
                    if name in ("queries", "keys")}


def test_the_calls_of_two_rows_are_those_by_hand():
    prefixes, responses = calls([[(3, 2), (2, 0)], [(1, 3)]], 8)
    # Position i of row j lies at 2 * i + j.
    assert plain(prefixes) == dict(
        queries=([0, 2, 4, 10, 12, 1], True), keys=([0, 2, 4, 10, 12, 1], True), cu_queries=[0, 3, 5, 6],
        cu_keys=[0, 3, 5, 6], max_queries=3, max_keys=3, causal=False)
    assert plain(responses) == dict(
        queries=([6, 8, 3, 5, 7], True), keys=([0, 2, 4, 6, 8, 1, 3, 5, 7], True), cu_queries=[0, 2, 5],
        cu_keys=[0, 5, 9], max_queries=3, max_keys=5, causal=True)
    assert {call.cu_keys.dtype for call in (prefixes, responses)} == {torch.int32}


def test_a_context_rank_cuts_queries_and_keeps_their_keys():
    first, second = calls([[(5, 7)]], 12, spans=context_spans(12, 1, 2))  # holds 3 to 9, two chunks that adjoin
    assert (first.queries.index.tolist(), first.cu_keys.tolist()) == ([0, 1], [0, 5])
    assert (second.queries.index.tolist(), second.cu_queries.tolist()) == ([2, 3, 4, 5], [0, 4])
    assert second.cu_keys.tolist() == [0, 9] and second.keys.run == (0, 9)


def test_the_keys_of_an_example_that_both_slices_cut_are_there_twice():
    lengths = [[(1, 1), (1, 9)], [(2, 3), (3, 4)]]
    prefixes, responses = calls(lengths, 12, spans=context_spans(12, 0, 2))  # holds 0 to 3 and 9 to 12
    assert plain(prefixes)["keys"] == ([0, 4, 1, 3], True)
    # Responses 1 and 9 to 11 see keys 0, 1 and 2 to 11; those of the other row, 2 and 9 to 11, see 0 to 2 and 5 to 11.
    assert responses.cu_keys.tolist() == [0, 2, 2 + 10, 15, 15 + 7] and not responses.keys.parts
    call = calls([[(1, 11)]], 12, spans=context_spans(12, 0, 2))[1]
    assert call.keys.index.tolist() == [0, 1, 2, *range(12)] and call.keys.run is None
    (_, once), (places, again) = call.keys.parts
    assert (once.tolist(), places.tolist(), again.tolist()) == ([0, 1, 2], [*range(3, 15)], [*range(12)])


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_are_there_twice_for_an_example_on_both_sides_of_a_gap_alone(ranks):
    """Adding at them is slow: the last rank's slices adjoin, and no example is cut twice there."""
    doubled = 0
    for seed in range(PACKINGS):
        for rank in range(ranks):
            made = calls(packing(seed), ROW_TOKENS, spans=context_spans(ROW_TOKENS, rank, ranks))
            for call in made:
                index = call.keys.index.tolist()
                assert (len(set(index)) < len(index)) == bool(call.keys.parts)
                for _, rows in call.keys.parts:
                    assert len(set(rows.tolist())) == len(rows)
                doubled += bool(call.keys.parts)
            assert rank < ranks - 1 or not any(call.keys.parts for call in made)
    assert doubled


def test_keys_of_a_single_row_stay_where_they_are():
    prefixes, responses = calls([[(3, 2), (2, 1)]], 10)
    assert responses.keys.run == (0, 8) and prefixes.keys.run is responses.queries.run is None
    assert calls([[(3, 0)]], 10)[0].queries.run == (0, 3)
    k = torch.randn(10, HEADS, D)
    assert responses.keys.gather(k).data_ptr() == k.data_ptr() and responses.keys.gather(k[:, :, ::2]).is_contiguous()
    assert calls([[(3, 2)], [(2, 1)]], 10)[1].keys.run is None  # rows lie interleaved


@pytest.mark.parametrize("rows_at, again", [
    ([2, 3, 4], None), ([0, 1, 2, 3, 4, 5, 6], None), ([0], None), ([5, 0, 3], None), ([4, 5, 6], None),
    ([1, 4, 4, 2, 1], [False, False, True, False, True])])
def test_rows_are_gathered_and_scattered_back(rows_at, again):
    from hrm_megatron.attention.gather_scatter import RowIndex

    count = 7
    at = RowIndex.of(torch.tensor(rows_at), torch.device("cpu"), None if again is None else torch.tensor(again))
    assert (at.run is not None) == (rows_at == [*range(rows_at[0], rows_at[-1] + 1)]) and len(at) == len(rows_at)
    x, rows, total = torch.randn(count, 2), torch.randn(len(rows_at), 2), torch.randn(count, 2)
    wanted = torch.zeros(count, 2).index_add(0, torch.tensor(rows_at), rows)
    assert torch.equal(at.gather(x), x[rows_at])
    assert torch.equal(at.scatter(rows, count), wanted)
    assert torch.allclose(at.scatter_add_(rows, total.clone()), total + wanted)  # twice there: another order


def test_a_call_without_queries_is_left_out():
    assert [call.causal for call in calls([[(1, 0), (4, 0)], [(2, 0)]], 8)] == [False]
    assert calls([[], []], 8) == []
    only_responses = calls([[(2, 10)]], 12, spans=context_spans(12, 1, 2))
    assert [call.causal for call in only_responses] == [True]


def test_buckets_leave_few_shapes_and_the_same_sequences():
    shapes = {False: set(), True: set()}
    for seed in range(PACKINGS):
        for exact, rounded in zip(*(calls(packing(seed), ROW_TOKENS, bucketed) for bucketed in shapes), strict=True):
            for call, bucketed in ((exact, False), (rounded, True)):
                shapes[bucketed].add((len(call.cu_keys) - 1, call.max_queries, call.max_keys))
            n = len(exact.cu_keys)
            for name in ("cu_queries", "cu_keys"):
                cu = getattr(rounded, name)
                assert torch.equal(cu[:n], getattr(exact, name)) and (cu[n:] == cu[n - 1]).all()
            assert rounded.max_queries >= exact.max_queries and rounded.max_keys >= exact.max_keys
            assert torch.equal(rounded.queries.index, exact.queries.index)
            assert torch.equal(rounded.keys.index, exact.keys.index)
    assert len(shapes[True]) <= 12 < 50 < len(shapes[False])


def test_buckets_are_powers_of_two():
    from hrm_megatron.attention.varlen import bucket

    assert [bucket(n) for n in (1, 16, 17, 32, 33, 4096, 4097)] == [16, 16, 32, 32, 64, 4096, 8192]


def test_all_ticks_and_layers_share_what_a_micro_batch_makes_once(single_rank, monkeypatch):
    from hrm_megatron.attention import gather_scatter, varlen
    from hrm_megatron.attention.core import VarlenAttention
    from hrm_megatron.data.batch import PackedBatch, assemble_row
    from hrm_megatron.model import specs
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    made, used = [], []

    class Counted(VarlenAttention):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.primitive = self.counted

        def counted(self, q, k, v, call, scale):
            used.append(call)
            return varlen.plain_varlen(q, k, v, call, scale)

    send = varlen.send
    for module in (varlen, gather_scatter):
        monkeypatch.setattr(module, "send", lambda t, device: made.append(t) or send(t, device))
    monkeypatch.setattr(specs, "core_attention", lambda *_: Counted)
    model = HRMModel(hrm_config(Architecture(2, HEADS * D, HEADS, 16, 250)), seed=3)
    tokens = torch.arange(1, 9).numpy()
    rows = [assemble_row([(tokens[:3], tokens[:4]), (tokens[:2], tokens[:1])], 12),
            assemble_row([(tokens[:1], tokens[:8])], 12)]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    for _ in range(2):
        made.clear(), used.clear()
        model(batch=PackedBatch.from_rows(stacked), bp_steps=3)[0].sum().backward()
        ticks, layers = 8, 2
        assert len(used) == ticks * layers * 2 and len({id(call) for call in used}) == 2
        assert len(made) == 2 * 4


def test_no_device_is_asked_for_a_value(single_rank):
    """On the meta device there are none: whatever would make the host wait for a GPU fails. The operator is torch's."""
    lengths = [[(3, 4), (5, 0), (1, 6)], [(2, 2)]]
    meta = torch.device("meta")
    rotation = Rotation.of(torch.zeros(2, ROW_TOKENS, dtype=torch.int64, device=meta), D, 1e4)
    q, k, v = (torch.empty(ROW_TOKENS, 2, HEADS, D, device=meta, dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))
    out = attention("varlen")(q, k, v, packed_seq_params=PrefixSequences(lengths, rotation, ROW_TOKENS))
    assert out.is_meta and out.shape == (ROW_TOKENS, 2, HEADS * D) and out.dtype == torch.bfloat16
    out.backward(torch.empty_like(out))
    assert {t.grad.shape for t in (q, k, v)} == {q.shape}


OPERATORS = {
    "torch_attn._varlen_attn":
        "(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k, SymInt max_q, SymInt max_k, "
        "bool is_causal=False, float? scale=None, SymInt[]? window_size=None) -> (Tensor, Tensor, Tensor)",
    "torch_attn._varlen_attn_backward":
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor cu_seq_q, "
        "Tensor cu_seq_k, SymInt max_q, SymInt max_k, bool is_causal, Tensor rng_state, float? scale=None, "
        "SymInt[]? window_size=None) -> (Tensor, Tensor, Tensor)",
    "aten._flash_attention_forward":
        "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, "
        "float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
        "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, "
        "Tensor? alibi_slopes=None) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, "
        "Tensor debug_attn_mask)",
}


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_has_the_operators_that_we_know(name):
    import torch.nn.attention.varlen

    namespace, operator = name.split(".")
    found = getattr(getattr(torch.ops, namespace), operator).default._schema
    assert str(found) == f"{namespace}::{operator}{OPERATORS[name]}"


def test_torch_takes_what_we_give_and_the_word_for_causal_is_a_window():
    from torch.nn.attention.varlen import varlen_attn

    assert " ".join(inspect.signature(varlen_attn).parameters) == (
        "query key value cu_seq_q cu_seq_k max_q max_k return_aux scale window_size")
    assert "(-1, 0) for causal attention" in varlen_attn.__doc__


LIBRARIES = {"varlen": stand_ins.flash_attention_in_torch, "te": stand_ins.transformer_engine}


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_are_called_as_they_want_to_be(single_rank, parity, name):
    """Through torch's own varlen_attn and its autograd, over a stand-in for FlashAttention 2; likewise Transformer
    Engine's module."""
    worst = bound = 0.0
    with LIBRARIES[name]():
        for seed in range(PACKINGS):
            lengths = packing(seed)
            overrides = dict(softmax_scale=0.7) if seed % 2 else {}
            generator = torch.Generator().manual_seed(seed)
            q, k, v = (torch.randn(ROW_TOKENS, len(lengths), HEADS, D, generator=generator) for _ in range(3))
            probe = torch.randn(ROW_TOKENS, len(lengths), HEADS * D, generator=generator)
            plain = SimpleNamespace(attend=partial(attend, scale=overrides.get("softmax_scale")))
            layers = attention(name, **overrides), plain, attention("dense", **overrides)
            have, plain, exact = (outputs_and_gradients(
                layer, q, k, v, probe, PrefixSequences(lengths, None, ROW_TOKENS)) for layer in layers)
            worst, bound = max(worst, difference(have, exact)), max(bound, ORDERS * difference(plain, exact))
    parity(f"{PACKINGS} packings through {name}'s interface", worst, bound)


def test_transformer_engine_meets_few_shapes_and_leaves_checkpoints_alone(single_rank):
    with stand_ins.transformer_engine() as found:
        layer = attention("te")
        for seed in range(PACKINGS):
            q, k, v = (torch.randn(ROW_TOKENS, len(packing(seed)), HEADS, D) for _ in range(3))
            layer.attend(q, k, v, PrefixSequences(packing(seed), None, ROW_TOKENS))
    assert [module.mask for module in found.built] == ["padding", "padding_causal_bottom_right"]
    assert all(0 < len(module.bounds) <= 6 for module in found.built)
    assert layer.state_dict() == {}


def test_transformer_engine_does_not_fall_back_in_silence(single_rank):
    from megatron.core.transformer.enums import AttnBackend

    q = torch.randn(ROW_TOKENS, 1, HEADS, D)
    with stand_ins.transformer_engine(fused=False):
        layer, asked_for = attention("te"), attention("te", attention_backend=AttnBackend.unfused)
    with pytest.raises(ConfigError, match="finds no fused kernel .* give --attention-kernel varlen"):
        layer.attend(q, q, q, PrefixSequences([[(3, 4)]], None, ROW_TOKENS))
    assert isinstance(asked_for.primitive.modules[True].unfused_attention, torch.nn.Identity)


@pytest.mark.parametrize("kernel, backend, exported, line", [
    ("te", "auto", {}, None), ("te", "flash", {"NVTE_FUSED_ATTN": "0", "NVTE_FLASH_ATTN": "1"}, None),
    ("cpu", "auto", {"NVTE_FUSED_ATTN": "0"}, None),  # which nobody reads there
    ("te", "auto", {"NVTE_FUSED_ATTN": "0"}, "NVTE_FUSED_ATTN=0 is exported, and --attention-backend auto makes it 1"),
    ("te", "flash", {"NVTE_UNFUSED_ATTN": "1"}, "--attention-backend flash makes it 0; unset it, and choose by --att"),
    ("cpu", "fused", {}, "--attention-backend fused: chooses within --attention-kernel te, and this run takes cpu; "),
])
def test_the_choice_of_a_backend(single_rank, monkeypatch, kernel, backend, exported, line):
    from megatron.core.transformer.enums import AttnBackend

    from hrm_megatron.attention.te_attention import BACKENDS, check_backend

    for one in BACKENDS:
        monkeypatch.delenv(f"NVTE_{one.upper()}_ATTN", raising=False)
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    with contextlib.nullcontext() if line is None else pytest.raises(ConfigError, match=re.escape(line)):
        check_backend(kernel, AttnBackend[backend])


def test_variables_of_transformer_engine_concern_no_other_kernel(single_rank, monkeypatch):
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    architecture = Architecture(1, HEADS * D, HEADS, 256, 250)
    HRMModel(hrm_config(architecture, attention_kernel="sdpa"), seed=1)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="NVTE_FUSED_ATTN=0 is exported, and"):
        patch.setattr("hrm_megatron.model.hrm.kernel_of", lambda *_: "te")
        HRMModel(hrm_config(architecture), seed=1)
