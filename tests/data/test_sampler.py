"""The sampled folder, bit for bit the reference's; beyond what its golden folder shows, by plain counting."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hrm_megatron.data.sampled import ARRAYS, SampledFolder
from tests.damage import zero_in_header

RULES = "prefix_config.yaml"


def run(tool, folder, rules, output, capsys, seed=1, epochs=2, context=49):
    """Exit status, and what was printed."""
    status = tool("sample_data")(["--input-tokenized", str(folder), "--sampling-rules", str(rules), "--seed", str(seed),
                                  "--epochs", str(epochs), "--context-tokens", str(context), "--sampled-output",
                                  str(output)])
    said = capsys.readouterr()
    return status, said.out, said.err


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_folder_is_the_references_bit_for_bit(tool, golden, tmp_path, capsys):
    status, out, _ = run(tool, golden / "tokenized", golden / "tokenized" / RULES, tmp_path / "new" / "sampled", capsys)
    assert status == 0 and "beta__part.parquet: 30 rows fit, 60 an epoch, 120 in all" in out
    assert files(tmp_path / "new" / "sampled") == files(golden / "sampled")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sampled"]


def write_tokenized(folder, sources, vocab_size=70_000):
    """Sources: name > (prefix length, response length) of each row. A row's tokens are its number."""
    folder.mkdir()
    (folder / "tokenizer_info.json").write_text(json.dumps({"tokenizer_path": "tök", "vocab_size": vocab_size}))
    for name, rows in sources.items():
        (folder / name).mkdir()
        lengths = np.array(rows, np.uint64).reshape(-1, 2)
        starts = np.concatenate([[0], np.cumsum(lengths.reshape(-1))[:-1]]).astype(np.uint64).reshape(-1, 2)
        for array, values in zip(ARRAYS, (starts[:, 0], lengths[:, 0], starts[:, 1], lengths[:, 1]), strict=True):
            np.save(folder / name / f"{array}.npy", values)
        np.save(folder / name / "tokens.npy", np.repeat(np.arange(len(rows), dtype=np.uint32), lengths.sum(1)
                                                        .astype(int)))


def by_the_order_of_draws(sources, rules, seed, epochs, context):
    """(source, row, response length) of each epoch: what is drawn when, spelled out row by row."""
    random = np.random.Generator(np.random.Philox(seed))
    waiting, found = {name: [] for name in sources}, []
    for _ in range(epochs):
        drawn = []
        for name in sorted(sources):
            cap, repeat, drop = next((rule for prefix, rule in rules.items() if name.startswith(prefix)), (None, 1, 0))
            fit = [(row, min(r, context - p)) for row, (p, r) in enumerate(sources[name])
                   if r >= 2 and p < context and not (drop and p + r > context)]
            for _ in range(min(cap or len(fit), len(fit)) * repeat):
                if not waiting[name]:
                    waiting[name] = random.permutation(len(fit)).tolist()
                row, response = fit[waiting[name].pop(0)]
                drawn.append((name, row, response))
        found.append([drawn[i] for i in random.permutation(len(drawn))])
    return found


def test_rules_over_three_epochs_draw_in_the_references_order(tool, tmp_path, capsys):
    random = np.random.default_rng(3)
    sources = {name: random.integers(1, 30, (count, 2)).tolist() for name, count in
               (("a__1", 23), ("a__2", 5), ("b", 17), ("c__x", 31), ("none", 4))}
    sources["b"] += [[40, 3], [39, 3], [3, 60], [3, 1]]
    rules = {"a__": (4, 7, False), "b": (None, 2, True), "c__x": (None, 1, False)}
    (tmp_path / "rules.yaml").write_text("- {prefix: a__, max_per_file: 4, repeat: 7}\n"
                                         "- {prefix: b, repeat: 2, long_context: drop}\n- {prefix: c__x}\n")
    write_tokenized(tmp_path / "in", sources)
    assert run(tool, tmp_path / "in", tmp_path / "rules.yaml", tmp_path / "out", capsys, 9, 3, 40)[0] == 0
    folder = SampledFolder(tmp_path / "out")
    tokens, total = np.load(tmp_path / "out" / "tokens.npy"), 0
    assert tokens.dtype == np.int32 and folder.epochs == 3
    starts = dict(zip(sorted(sources), np.cumsum([0, *(np.sum(sources[name]) for name in sorted(sources))]),
                      strict=False))
    for epoch, expected in enumerate(by_the_order_of_draws(sources, rules, 9, 3, 40)):
        arrays = {name: np.load(tmp_path / "out" / f"epoch_{epoch}" / f"{name}.npy") for name in ARRAYS}
        assert all(array.dtype == np.int64 for array in arrays.values())
        for i, (name, row, response) in enumerate(expected):
            prefix, _ = sources[name][row]
            first = starts[name] + np.sum(sources[name][:row])
            assert [arrays[array][i] for array in ARRAYS] == [first, prefix, first + prefix, response]
            total += prefix + response
        assert len(expected) == len(arrays["inst_len"])
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text(encoding="utf-8"))
    assert metadata == {"tokenizer_info": {"tokenizer_path": "tök", "vocab_size": 70_000}, "vocab_size": None,
                        "max_seq_len": 40, "total_length": round(total / 3)}


@pytest.mark.parametrize("vocab_size, dtype", [(255, np.uint8), (256, np.uint16), (65_535, np.uint16),
                                               (65_536, np.int32)])
def test_tokens_take_the_bytes_that_the_reference_gives_them(tool, tmp_path, capsys, vocab_size, dtype):
    write_tokenized(tmp_path / "in", {"a": [(2, 3)] * 4}, vocab_size)
    (tmp_path / "rules.yaml").write_text("- prefix: a")
    assert run(tool, tmp_path / "in", tmp_path / "rules.yaml", tmp_path / "out", capsys)[0] == 0
    assert np.load(tmp_path / "out" / "tokens.npy").dtype == dtype




@pytest.mark.parametrize("change, options, said", [
    (lambda folder: (folder / "rules.yaml").write_text("- prefix: z"), {}, "prefix 'z' matches none of the sources a"),
    (lambda folder: (folder / "out").mkdir(), {}, "out is already there; remove it"),
    (lambda folder: None, dict(epochs=0), "--epochs 0: give at least 1"),
    (lambda folder: None, dict(context=1), "--context-tokens 1: give at least 2"),
    (lambda folder: None, dict(context=2), "no row fits --context-tokens 2"),
    (lambda folder: (folder / "in" / "tokenizer_info.json").unlink(), {}, "tokenizer_info.json: No such file"),
    (lambda folder: (folder / "in" / "tokenizer_info.json").write_text("[1]"), {}, "info.json: no JSON object"),
    (lambda folder: shutil.rmtree(folder / "in" / "a"), {}, "no tokenized sources"),
    (lambda folder: np.save(folder / "in" / "a" / "inst_len.npy", np.ones(3, np.uint64)), {}, "of different lengths"),
    (lambda folder: np.save(folder / "in" / "a" / "resp_start.npy", np.full(4, 18, np.uint64)), {},
     "resp_start.npy: row 0 takes tokens 18 to 21 of 20"),
    (lambda folder: np.save(folder / "in" / "a" / "tokens.npy", np.array([None])), {}, "tokens.npy: cannot read"),
    (lambda folder: np.save(folder / "in" / "a" / "tokens.npy", np.ones((2, 2))), {}, "not a list of integers"),
    (lambda folder: zero_in_header(folder / "in" / "a" / "resp_len.npy"), {}, "resp_len.npy: cannot read"),
])
def test_bad_input_is_one_line_and_leaves_nothing(tool, tmp_path, capsys, change, options, said):
    write_tokenized(tmp_path / "in", {"a": [(2, 3)] * 4})
    (tmp_path / "rules.yaml").write_text("- prefix: a")
    change(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, _, error = run(tool, tmp_path / "in", tmp_path / "rules.yaml", tmp_path / "out", capsys, **options)
    assert status == 1 and said in error and len(error.splitlines()) == 1, error
    assert sorted(tmp_path.rglob("*")) == before
