"""What an epoch holds: parts, weights, rules and kept examples, by plain counting."""
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data import walk
from hrm_megatron.data.kept_examples import kept_files, write_kept
from hrm_megatron.data.mixture import MAX_ROW_TOKENS, WALK_STREAM, Mixture, Selection, distinct_tails, weighted_quotas
from hrm_megatron.data.plan import RowPlan
from hrm_megatron.data.sampling_rules import Rule, Rules, read_rules
from hrm_megatron.data.shuffle import stream_key
from hrm_megatron.data.split import PARTS, example_parts, prompts_for_empty_parts
from tests.data.listed_store import ListedStore
from tests.data.walks import feistel, scattered
from tests.stores import split_examples

ROW_TOKENS = 20


def store(folder, count, sources=None, longest=9, prompts=None):
    random = np.random.default_rng(count)
    return ListedStore(folder, prompts or [f"prompt {i}" for i in range(count)], random.integers(2, longest, count),
                       random.integers(2, longest, count), sources)


def drawn(mixture, epoch, window=7):
    loaded = mixture.epoch(epoch)
    windows = [loaded.window(start, min(start + window, len(loaded))) for start in range(0, len(loaded), window)]
    return np.concatenate([ids for ids, _ in windows]), np.concatenate([lengths for _, lengths in windows])


def test_an_epoch_of_all_datasets_has_each_example_once_in_an_order_of_its_own(tmp_path):
    mixture = Mixture([store(tmp_path / "a", 31), store(tmp_path / "b", 12)], ROW_TOKENS, Selection(seed=5))
    ids, lengths = drawn(mixture, 0)
    assert sorted(ids) == list(range(43)) and mixture.size == 43
    for i, length in zip(ids.tolist(), lengths.tolist(), strict=True):
        prefix, target = mixture.example(0, i)
        assert len(prefix) + len(target) - 1 == length
        assert set(prefix) == {i if i < 31 else i - 31}
        assert mixture.example_name(0, i) == f"{tmp_path}/{'a' if i < 31 else 'b'}/x, example {i if i < 31 else i - 31}"
    assert not np.array_equal(ids, drawn(mixture, 1)[0]) and np.array_equal(ids, drawn(mixture, 0, window=43)[0])
    assert not np.array_equal(ids, drawn(Mixture(mixture.stores, ROW_TOKENS, Selection(seed=6)), 0)[0])


def test_weights_are_shares_of_tokens_and_walk_through_all_examples(tmp_path):
    short, long = store(tmp_path / "a", 400, longest=5), store(tmp_path / "b", 300, longest=11)
    mixture = Mixture([short, long], ROW_TOKENS, Selection(seed=5, weights=(3.0, 1.0)))
    tokens = [int(sum(part.lengths()[0] + part.lengths()[1] - 1)) for part in (short, long)]
    seen = [Counter(), Counter()]
    for epoch in range(9):
        ids, lengths = drawn(mixture, epoch)
        own = [int(lengths[ids < 400].sum()), int(lengths[ids >= 400].sum())]
        # As many tokens as both together, but for the luck of which examples come: 5 standard errors of the mean.
        for have, share, part in zip(own, (0.75, 0.25), (short, long), strict=True):
            want = share * sum(tokens)
            spread = np.std(part.lengths()[0] + part.lengths()[1]) * np.sqrt(want / np.mean(part.lengths()[0]))
            assert abs(have - want) < 5 * spread + 20
        seen[0].update(ids[ids < 400].tolist())
        seen[1].update(ids[ids >= 400].tolist())
    for counts, size in zip(seen, (400, 300), strict=True):  # a walk: no example is two ahead of another
        assert len(counts) == size and max(counts.values()) - min(counts.values()) <= 1


def by_definition(sizes, quotas, seed, epoch):
    """The examples of an epoch in their order: each stream walks on through permutations of its own."""
    key, order = int(stream_key(seed, epoch)), []
    begins, firsts = np.cumsum([0, *quotas]), np.cumsum([0, *sizes])
    for i in range(begins[-1]):
        place = feistel(i, int(begins[-1]), key)
        k = int(np.searchsorted(begins, place, side="right")) - 1
        place, size = place - int(begins[k]), sizes[k]
        walked = epoch * quotas[k] + place
        own_key = scattered(int(stream_key(seed, WALK_STREAM, k)) + walked // size * 0x9E3779B97F4A7C15)
        at = place % size if quotas[k] % size == 0 else feistel(walked % size, size, own_key)
        order.append(int(firsts[k]) + at)
    return order


@pytest.mark.parametrize("rules, quotas", [(((None, 1), (None, 1)), (310, 45)), (((100, 2), (None, 3)), (200, 135))])
def test_an_epoch_is_its_definition(tmp_path, rules, quotas):
    data = store(tmp_path, 355, [("a", 310), ("b", 45)])
    rules = Rules(tmp_path / "r", tuple(Rule(name, *rule) for name, rule in zip("ab", rules, strict=True)))
    mixture = Mixture([data], ROW_TOKENS, Selection(seed=8, rules=rules))
    for epoch in (0, 1, 5):
        assert drawn(mixture, epoch, window=100)[0].tolist() == by_definition((310, 45), quotas, 8, epoch)


def test_blocks_of_any_size_give_one_epoch(tmp_path, monkeypatch):
    """With several datasets, weights and parts; an example has its length whichever block it is read in."""
    stores = [store(tmp_path / "a", 90), store(tmp_path / "b", 41, [("x", 29), ("y", 12)])]
    loaded = []
    for block_examples in (1 << 20, 7):
        monkeypatch.setattr(walk, "BLOCK_EXAMPLES", block_examples)
        mixture = Mixture(stores, ROW_TOKENS, Selection("80,20,0", 8, weights=(1.0, 2.0)))
        mixture.check(ROW_TOKENS)
        loaded.append([array.tolist() for array in drawn(mixture, 1)])
    assert loaded[0] == loaded[1]


def test_rows_longer_than_a_planned_number_holds_are_refused(tmp_path):
    data = ListedStore(tmp_path, ["p", "q"], [MAX_ROW_TOKENS, 1 << 30], [1, 1 << 30])
    assert drawn(Mixture([data], MAX_ROW_TOKENS), 0)[0].tolist() in ([0, 1], [1, 0])
    with pytest.raises(ConfigError, match="example 1 takes 2147483647 positions"):
        Mixture([data], MAX_ROW_TOKENS).check(MAX_ROW_TOKENS)
    with pytest.raises(ConfigError, match="rows of 16777215 positions.*smaller --seq-length"):
        Mixture([data], MAX_ROW_TOKENS + 1).check(MAX_ROW_TOKENS + 1)


def rules_file(folder, text):
    path = folder / "rules.yaml"
    path.write_text(text)
    return path


SOURCES = [("alpha.jsonl", 30), ("beta__one", 11), ("beta__two", 4), ("gamma", 7)]
RULES = """
- {prefix: alpha, max_per_file: 8}
- {prefix: beta__, repeat: 3, max_per_file: 5}
- {prefix: gamma, long_context: drop}
"""


def by_source(ids):
    borders = np.cumsum([count for _, count in SOURCES])
    return [ids[np.searchsorted(borders, ids, side="right") == k].tolist() for k in range(len(SOURCES))]


def test_rules_cap_repeat_and_walk_on(tmp_path):
    data = store(tmp_path, 52, SOURCES)
    mixture = Mixture([data], ROW_TOKENS, Selection(seed=2, rules=read_rules(rules_file(tmp_path, RULES))))
    seen = [Counter() for _ in SOURCES]
    for epoch in range(6):
        per_source = by_source(drawn(mixture, epoch)[0])
        assert [len(ids) for ids in per_source] == [8, 15, 12, 7]
        for counts, ids in zip(seen, per_source, strict=True):
            counts.update(ids)
            assert max(counts.values()) - min(counts.values()) <= 1
    assert [len(counts) for counts in seen] == [30, 11, 4, 7]
    assert sorted(by_source(drawn(mixture, 3)[0])[2]) == sorted([41, 42, 43, 44] * 3)


def test_rules_truncate_or_drop_what_is_longer_than_a_row(tmp_path):
    data = ListedStore(tmp_path, ["p"] * 8, [5, 5, 20, 21, 20, 5, 5, 5], [16, 17, 2, 2, 1, 2, 1, 300],
                       [("cut__a", 4), ("drop__a", 4)])
    for prefix, mode, kept in (("cut", "truncate", {0: 20, 1: 20, 2: 20, 5: 6, 7: 20}),
                               ("cut", "drop", {0: 20, 5: 6, 7: 20}),
                               ("drop", "drop", {0: 20, 1: 20, 2: 20, 5: 6})):
        rules = Rules(tmp_path / "r", (Rule(prefix, long_context=mode),))
        mixture = Mixture([data], ROW_TOKENS, Selection(rules=rules))
        mixture.check(ROW_TOKENS)
        ids, lengths = drawn(mixture, 0)
        assert dict(zip(ids.tolist(), lengths.tolist(), strict=True)) == kept
        for i, length in kept.items():
            prefix_ids, target_ids = mixture.example(0, i)
            assert len(prefix_ids) == data.prefixes[i] and len(prefix_ids) + len(target_ids) - 1 == length
    with pytest.raises(ConfigError, match="x, example 7 takes 304 positions, more than a row of 20"):
        Mixture([data], ROW_TOKENS).check(ROW_TOKENS)


def test_what_rules_leave_out_for_its_length_is_counted_and_a_rule_of_nothing_else_refused(tmp_path):
    data = ListedStore(tmp_path, ["p"] * 8, [5, 5, 20, 21, 20, 5, 5, 5], [16, 17, 2, 2, 1, 2, 1, 300],
                       [("cut__a", 4), ("drop__a", 4)])
    for mode, unfit in (("truncate", {"cut__a": (1, 4), "drop__a": (2, 4)}),
                        ("drop", {"cut__a": (3, 4), "drop__a": (2, 4)})):
        rules = Rules(tmp_path / "r", (Rule("cut", long_context=mode),))
        assert Mixture([data], ROW_TOKENS, Selection(rules=rules)).unfit() == unfit
    assert Mixture([data], ROW_TOKENS).unfit() == {}
    rules = read_rules(rules_file(tmp_path, "- {prefix: drop}\n- {prefix: cut, repeat: 2}"))
    short = ListedStore(tmp_path, ["p"] * 3, [9, 9, 2], [2, 2, 2], [("cut__a", 2), ("drop__a", 1)])
    Mixture([short], 9, Selection(rules=rules)).epoch(0)
    with pytest.raises(ConfigError, match="rules.yaml: rule 2, prefix 'cut': none of its examples is left .* of 8 tok"):
        Mixture([short], 8, Selection(rules=rules)).epoch(0)


def test_rules_are_of_training_and_need_no_source_of_held_out_data(tmp_path):
    rules = read_rules(rules_file(tmp_path, RULES))
    valid = Mixture([store(tmp_path / "v", 9, [("held_out", 9)])], ROW_TOKENS, Selection(rules=rules), "valid")
    assert sorted(drawn(valid, 0)[0]) == [*range(9)]


def test_datasets_of_one_name_are_told_apart_by_their_folders():
    paths = [Path(path) for path in ("/x/en/data", "/x/de/data", "/x/de/more")]
    assert distinct_tails(paths[:1]) == ["data"] and distinct_tails(paths[1:]) == ["data", "more"]
    assert distinct_tails(paths) == ["en/data", "de/data", "de/more"]
    assert distinct_tails([paths[0], paths[0]]) == ["data", "data"]  # the same one twice
    assert distinct_tails([Path("/a"), Path("/")]) == ["a", "/"]


@pytest.mark.parametrize("text, said", [
    ("- {prefix: alpha}\n- {prefix: delta}", "rule 2, prefix 'delta' matches none of the sources alpha.jsonl, beta_"),
    ("- {prefix: beta}\n- {prefix: beta__one}", "rule 2, prefix 'beta__one': all its sources are taken by the rule of "
                                                "prefix 'beta' before it"),
    ("- {prefix: alpha, max_per_file: 0}", "rule 1: max_per_file 0 is no number of at least 1"),
    ("- {prefix: alpha, repeat: 1.5}", "rule 1: repeat 1.5 is no number"),
    ("- {prefix: alpha, repeat: true}", "rule 1: repeat True is no number"),
    ("- {prefix: alpha, max_rows: 3}", "rule 1: unknown key 'max_rows'; there are prefix, max_per_file, repeat"),
    ("- {prefix: alpha, long_context: cut}", "rule 1: long_context 'cut'; give truncate or drop"),
    ("- {max_per_file: 3}", "rule 1: .* has no prefix"),
    ("- {prefix: a}\n- {prefix: a}", "rule 2.*there is one before"),
    ("prefix: alpha", "holds dict, not a list of rules"), ("", "holds NoneType"), ("- {prefix: [", "not YAML"),
])
def test_rules_without_effect_or_sense_are_refused(tmp_path, text, said):
    data = store(tmp_path, 52, SOURCES)
    with pytest.raises(ConfigError, match=said) as refusal:
        Mixture([data], ROW_TOKENS, Selection(rules=read_rules(rules_file(tmp_path, text))))
    assert str(refusal.value).startswith(f"{tmp_path}/rules.yaml") and "\n" not in str(refusal.value)


def test_one_question_is_on_one_side(tmp_path):
    prompts = [f"question {i % 700}" for i in range(3000)]
    data = store(tmp_path, 3000, prompts=prompts)
    parts = [Mixture([data], ROW_TOKENS, Selection("80,15,5", seed=4), part) for part in ("train", "valid", "test")]
    found = [drawn(part, 0)[0].tolist() for part in parts]
    assert sorted(i for ids in found for i in ids) == list(range(3000))
    questions = [{prompts[i] for i in ids} for ids in found]
    assert not questions[0] & questions[1] and not questions[0] & questions[2] and not questions[1] & questions[2]
    counted = dict(zip(PARTS, map(len, found), strict=True))
    for asked, share, part in zip(questions, (0.8, 0.15, 0.05), parts, strict=True):
        assert abs(len(asked) - 700 * share) < 5 * np.sqrt(700 * share * (1 - share))  # binomial, 5 deviations
        assert part.count_examples() == counted


def test_a_dataset_of_the_smallest_weight_gives_one_example():
    assert weighted_quotas((1e-9, 1.0), (10, 10), (100, 100)) == [1, 20]


def test_a_question_keeps_its_side_when_the_data_grows():
    keys = np.random.default_rng(0).integers(0, 2**64, 5000, np.uint64)
    before, after = (example_parts(count, "90,9,1", 3, keys[:count]) for count in (2000, 5000))
    assert np.array_equal(before, after[:2000]) and set(before) == {0, 1, 2}
    assert not np.array_equal(before, example_parts(2000, "90,9,1", 4, keys[:2000]))


def test_no_part_with_a_weight_is_empty_while_there_are_two_questions():
    keys = np.repeat(np.arange(4, dtype=np.uint64), 3)
    for seed in range(40):
        sizes = [len(part) for part in split_examples(12, "98,1,1", seed, keys)]
        assert sum(sizes) == 12 and min(sizes) >= 3 and not any(size % 3 for size in sizes)
    assert [len(part) for part in split_examples(3, "98,2", 1, keys[:3])] in ([3, 0, 0], [0, 3, 0])
    assert not any(prompts_for_empty_parts([(3, keys[:3])], "98,2", seed) for seed in range(40))  # it is the only one
    assert [len(part) for part in split_examples(12, "1", 1, keys)] == [12, 0, 0]


def test_parts_of_many_examples_are_found_in_little_memory():
    """Less than a byte of each: the first block has all parts already."""
    keys = np.random.default_rng(0).integers(0, 2**64, 1 << 22, np.uint64)
    prompts_for_empty_parts([(9, keys[:9])], "97,3,0", 3)  # compiles
    tracemalloc.start()
    try:
        assert not prompts_for_empty_parts([(len(keys), keys)], "97,3,0", 3)
        assert tracemalloc.get_traced_memory()[1] < len(keys)
    finally:
        tracemalloc.stop()


def test_a_part_is_found_in_whichever_block_it_is(monkeypatch):
    keys = np.random.default_rng(0).integers(0, 2**64, 50, np.uint64)
    for seed in range(20):
        monkeypatch.setattr(walk, "BLOCK_EXAMPLES", 1 << 20)
        whole = prompts_for_empty_parts([(50, keys)], "97,3,0", seed)
        assert bool(whole) == (1 not in example_parts(50, "97,3,0", seed, keys))
        monkeypatch.setattr(walk, "BLOCK_EXAMPLES", 7)
        assert prompts_for_empty_parts([(50, keys)], "97,3,0", seed) == whole


def test_several_datasets_are_the_data_of_before_unless_one_alone_would_have_an_empty_part(tmp_path):
    """Older versions filled the empty parts of each dataset by itself, and named the split alone."""
    few, many = store(tmp_path / "few", 10), store(tmp_path / "many", 600)
    changed = set()
    for seed in range(10):
        both = Mixture([few, many], ROW_TOKENS, Selection("97,3,0", seed), "valid")
        alone = [Mixture([one], ROW_TOKENS, Selection("97,3,0", seed), "valid") for one in both.stores]
        other = any(not np.array_equal(both.parts_of(k), one.parts_of(0)) for k, one in enumerate(alone))
        assert ("together" in both.contents) == ("together" in both.identity(0)) == other
        changed.add(other)
    assert changed == {False, True}


def test_one_question_of_two_datasets_is_on_one_side(tmp_path):
    few, many = [f"question {i}" for i in range(10)], [f"question {i}" for i in range(600)]
    stores = [store(tmp_path / name, len(prompts), prompts=prompts) for name, prompts in (("few", few), ("many", many))]
    filled = 0
    for seed in range(10):
        parts = [Mixture(stores, ROW_TOKENS, Selection("97,3,0", seed), part) for part in ("train", "valid")]
        asked = [{[*few, *many][i] for i in drawn(part, 0)[0].tolist()} for part in parts]
        assert not asked[0] & asked[1] and asked[0] | asked[1] == {*many}
        filled += bool(set(few) & asked[1])
        assert not parts[0].given_prompts
    assert filled < 10  # in some, all of the few train
    alone = [Mixture([stores[0], stores[0]], ROW_TOKENS, Selection("97,3,0", seed=0), part) for part in PARTS]
    assert alone[0].given_prompts.keys() == {1} and alone[0].count_examples() == dict(train=18, valid=2, test=0)


def test_without_keys_examples_are_split_one_by_one(tmp_path):
    data = ListedStore(tmp_path, [None] * 200, [3] * 200, [3] * 200)
    assert Mixture([data], ROW_TOKENS, Selection("97,3,0", seed=1)).count_examples() == dict(train=194, valid=6, test=0)


def test_examples_that_are_not_kept_are_in_no_part(tmp_path):
    data = store(tmp_path, 60)
    kept = np.arange(60) % 7 != 0
    before = Mixture([data], ROW_TOKENS, Selection("80,20,0", seed=1)).identity(0)
    write_kept(data, kept, {"duplicates": 9})
    parts = [Mixture([data], ROW_TOKENS, Selection("80,20,0", seed=1), part) for part in ("train", "valid")]
    assert sorted(i for part in parts for i in drawn(part, 0)[0].tolist()) == np.flatnonzero(kept).tolist()
    assert parts[0].identity(0) != before
    data.files[0].write_text("another dataset")
    with pytest.raises(ConfigError, match="x.kept.json: made for another dataset; deduplicate again, or delete it"):
        drawn(parts[0], 0)
    kept_files(data.prefix)[1].unlink()
    assert len(drawn(Mixture([data], ROW_TOKENS), 0)[0]) == 60


def test_held_out_parts_are_whole_whatever_the_mixture_of_training(tmp_path):
    data = store(tmp_path, 52, SOURCES)
    selection = Selection("50,50,0", seed=2, rules=read_rules(rules_file(tmp_path, RULES)))
    valid = drawn(Mixture([data], ROW_TOKENS, selection, "valid"), 0)[0]
    train = {i for epoch in range(9) for i in drawn(Mixture([data], ROW_TOKENS, selection), epoch)[0].tolist()}
    assert len(valid) == len(set(valid.tolist())) and train | set(valid.tolist()) == set(range(52))
    assert not train & set(valid.tolist())


@pytest.mark.parametrize("change", [dict(seed=3), dict(split="80,20,0"), dict(weights=(1.0, 2.0)),
                                    dict(rules=Rules("r", (Rule("x", repeat=2),)))])
def test_what_changes_an_epoch_changes_its_identity(tmp_path, change):
    stores = [store(tmp_path / "a", 31), store(tmp_path / "b", 12)]
    base, changed, moved = (Mixture(stores, ROW_TOKENS, Selection(**options)) for options in ({}, change, {}))
    assert base.identity(0) == moved.identity(0) != changed.identity(0)


def test_held_out_examples_are_the_same_whatever_the_mixture_of_training(tmp_path):
    """Of data of their own also with another seed."""
    stores = [store(tmp_path / "a", 31), store(tmp_path / "b", 12)]

    def contents(**options):
        return Mixture(stores, ROW_TOKENS, Selection(**options), "valid").contents
    assert contents() == contents(seed=3) == contents(weights=(1.0, 2.0))
    twice, few = (Rules("r", (rule,)) for rule in (Rule("x", repeat=2), Rule("x", max_per_file=9)))
    assert contents(rules=twice) == contents(rules=few)
    split = dict(split="80,20,0")
    assert len({contents(), contents(**split), contents(**split, seed=3), contents(rules=Rules("r", (
        Rule("x", long_context="drop"),)))}) == 4
    assert Mixture(stores[:1], ROW_TOKENS, Selection(), "valid").contents != contents()


def test_rows_of_a_mixture_are_the_same_for_any_reader(tmp_path):
    stores = [store(tmp_path / "a", 310), store(tmp_path / "b", 120)]
    selection = Selection("90,10,0", 7, weights=(1.0, 2.0))
    plans = [RowPlan(Mixture(stores, ROW_TOKENS, selection), ROW_TOKENS, 7, cache, window_examples=64)
             for cache in (None, tmp_path / "rows")]
    assert plans[0].locate(900).epoch >= 1
    for row in range(0, 900, 7):
        one, other = (plan.locate(row) for plan in plans)
        assert one.epoch == other.epoch and np.array_equal(one.example_ids, other.example_ids)
