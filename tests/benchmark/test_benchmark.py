"""What the benchmark of whole steps reads, counts and says."""
import gzip
import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from hrm_megatron.benchmark import train
from hrm_megatron.benchmark.conversion import measure as measure_conversion
from hrm_megatron.benchmark.kernels import breakdown
from hrm_megatron.benchmark.peak import SHORTEST_ROW, in_the_longest_row_that_fits
from hrm_megatron.benchmark.record import add_row, output_folder
from hrm_megatron.benchmark.rows import write_random_examples
from hrm_megatron.config import Architecture, ConfigError, Preset
from tests.modes import wrong_modes
from tests.tools import load_tool
from tests.training.conftest import fullbatch_arguments, native_start, uninterrupted, written  # noqa: F401  # fixtures

ROOT = Path(__file__).parents[2]


def trace(path, events):
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [{"ph": "X", "tid": 1, **event} for event in events]}, file)
    return path


def test_kernels_are_summed_by_what_they_do(tmp_path):
    found = breakdown(trace(tmp_path / "t.gz", [
        {"cat": "kernel", "name": "nvjet_hsh_128x256", "ts": 0, "dur": 50},
        {"cat": "kernel", "name": "sm90_xmma_gemm_bf16", "ts": 60, "dur": 10},
        {"cat": "kernel", "name": "void pytorch_flash::flash_fwd_kernel", "ts": 70, "dur": 25},
        {"cat": "kernel", "name": "ncclDevKernel_ReduceScatter", "ts": 70, "dur": 5},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 99, "dur": 4},
        {"cat": "kernel", "name": "triton_poi_fused_silu_mul", "ts": 99, "dur": 6},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1000}]))
    assert [(share.group, round(1e6 * share.seconds)) for share in found] == [
        ("matmuls", 60), ("attention", 25), ("other element-wise", 6), ("communication", 5),
        ("copies and casts", 4)]
    assert [share.share for share in found] == pytest.approx([0.6, 0.25, 0.06, 0.05, 0.04])


def test_operators_of_a_cpu_count_without_what_they_call(tmp_path):
    found = breakdown(trace(tmp_path / "t.gz", [
        {"cat": "cpu_op", "name": "aten::linear", "ts": 0, "dur": 100},
        {"cat": "cpu_op", "name": "aten::addmm", "ts": 10, "dur": 60},
        {"cat": "cpu_op", "name": "aten::copy_", "ts": 12, "dur": 20},
        {"cat": "cpu_op", "name": "aten::add", "ts": 100, "dur": 7},
        {"cat": "cpu_op", "name": "aten::mul", "ts": 50, "dur": 3, "tid": 2}]))
    assert {share.group: round(1e6 * share.seconds) for share in found} == {
        "matmuls": 40, "copies and casts": 20, "other element-wise": 40 + 7 + 3}


@pytest.mark.parametrize("row_tokens", [128, 4096])
def test_random_examples_fill_the_rows_that_were_asked_for(tmp_path, row_tokens):
    from hrm_megatron.data.dataset import PackedRows
    from hrm_megatron.data.sampled import SampledFolder

    write_random_examples(tmp_path / "data", row_tokens, 6, 300)
    folder = SampledFolder(tmp_path / "data")
    prefix, response = folder.epoch_lengths(0)
    assert (prefix + response).sum() > 6 * row_tokens and (prefix + response).max() <= row_tokens / 2
    rows = PackedRows(folder, row_tokens, 0, 6)
    assert all(rows[i]["tokens"].max() < 300 for i in range(6))


@pytest.mark.parametrize("flag", ["--tensorboard-dir=x", "--exit-interval"])
def test_flags_of_the_profile_are_not_overridden_in_silence(tmp_path, monkeypatch, capsys, flag):
    tool = load_tool("profile_training")
    monkeypatch.setattr(sys, "argv", ["profile_training.py", "--output", str(tmp_path / "out"), "--", flag, "3"])
    assert tool.main() == 1
    assert capsys.readouterr().err.startswith(f"error: {flag.partition('=')[0]}: this tool gives it, by --output")


def saved_at(folder, step):
    """An iteration whose save came to its end, as far as its names tell."""
    (folder / f"iter_{step:07d}").mkdir(parents=True)
    (folder / f"iter_{step:07d}" / "metadata.json").write_text("{}")
    (folder / f"iter_{step:07d}" / ".metadata").write_text("")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


@pytest.mark.parametrize("began, kept, last", [
    (None, [], 12), (1, ["--load", "RUN"], 12), (12, ["--load", "RUN"], 23), (4000, ["--load", "RUN"], 4011)])
def test_a_profile_of_a_run_that_saves_writes_nothing_into_it(tmp_path, monkeypatch, capsys, began, kept, last):
    tool, run, commands = load_tool("profile_training"), tmp_path / "run", []
    if began:
        saved_at(run, began)
    monkeypatch.setattr(tool, "run_command", lambda command: commands.append([*map(str, command)]) or 0)
    saving = ["--save", run, "--save-interval=5", "--save-retain-interval", 10, "--most-recent-k", 2, "--no-save-optim",
              "--async-save", "--use-persistent-ckpt-worker", "--on-loss-spike", "rollback"]
    monkeypatch.setattr(sys, "argv", ["profile_training.py", "--output", str(tmp_path / "out"), "--", "--lr", "1e-3",
                                      *map(str, saving), "--eval-tasks", "a", "b", "--load", str(run), "--bf16"])
    assert tool.main() == 1
    (command,), said = commands, capsys.readouterr()
    given = command[command.index("hrm_megatron.pretrain") + 1:command.index("--tensorboard-dir")]
    assert given == ["--lr", "1e-3", "--eval-tasks", "a", "b", *(str(run) if word == "RUN" else word for word in kept),
                     "--bf16"]
    assert f"left out, so that nothing of the run is written: --save {run} --save-interval 5 " in said.out
    assert f"no trace: the run ended with exit code 0, and iteration {last} was to be its last" in said.err
    assert command[-6:] == ["--profile-step-start", "10", "--profile-step-end", str(last), "--exit-interval", str(last)]


def test_a_profile_of_a_fine_tuning_begins_where_that_began(tmp_path):
    from hrm_megatron.benchmark.profiled import first_iteration, without_saves

    run, begun_from = saved_at(tmp_path / "run", 12), saved_at(tmp_path / "pretrained", 40)
    flags = ["--finetune", "--pretrained-checkpoint", str(begun_from)]
    assert without_saves([*flags, "--load", str(run), "--save", str(run)])[0] == flags and first_iteration(flags) == 0
    with pytest.raises(ConfigError, match="--load .*none: no checkpoint there"):
        first_iteration(["--load", str(tmp_path / "none")])


@pytest.mark.parametrize("words", ["step --pairs 0", "step --layers 0", "gpu --hrm-preset B --steps 0",
                                   "gpu --sizes 0 32 2", "attention --rows 0 --rounds 2", "attention --rounds 0",
                                   "host --rows 0", "generate --batches 1 -1", "calibrate --output x --rounds x"])
def test_counts_are_whole_numbers_from_1(monkeypatch, capsys, words):
    tool = load_tool("benchmark")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        tool.main()
    assert re.search(r"error: argument --[a-z]+: \S+ is no whole number from 1$", capsys.readouterr().err.strip())


def test_lists_given_twice_replace_the_default_together(monkeypatch):
    tool, given = load_tool("benchmark"), []
    monkeypatch.setattr(tool, "time_generation", lambda args: given.append((args.batches, args.dtypes)))
    for words in ("", "--batches 3 4 --dtypes bfloat16 --batches 5", ""):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "generate", *words.split()])
        assert tool.main() == 0
    default = ([1, 8, 32], ["float32", "bfloat16"])
    assert given == [default, ([3, 4, 5], ["bfloat16"]), default]


def test_a_profile_has_a_step(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["profile_training.py", "--output", "x", "--steps", "0", "--", "--bf16"])
    with pytest.raises(SystemExit, match="2"):
        load_tool("profile_training").main()
    assert "argument --steps: 0 is no whole number from 1" in capsys.readouterr().err


def test_a_folder_that_was_measured_in_is_refused(tmp_path):
    (tmp_path / "data" / "epoch_0").mkdir(parents=True)
    with pytest.raises(ConfigError, match="/data exists; give another --output, or remove it"):
        train.measure(Preset(1, 32, 2), 64, 1, 2, 300, 5, tmp_path)


def test_a_run_that_logs_no_speed_of_a_step_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run_command", lambda *_: 0)
    (tmp_path / "log").mkdir()
    with SummaryWriter(str(tmp_path / "log")) as log:
        log.add_scalar("tokens per second", 7.0, 6)
    with pytest.raises(ConfigError, match="the run logged no speed of step 7; .* before step 9 or logs less"):
        train.measure(Preset(1, 32, 2), 64, 1, 2, 300, 5, tmp_path)


def test_ticks_that_transformers_does_not_train_are_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    tool = load_tool("benchmark")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu", "--hrm-preset", "B", "--bp-steps", "2", "--peer",
                                      "--output", str(tmp_path / "out")])
    assert tool.main() == 1
    assert "bp steps 2: transformers' HrmText trains all 2 H ticks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--num-layers", "--bp-max-steps=2", "--model-type", "--h-cycles", "--exit-interval",
                                  "--load=x", "--epochs", "--match-flops-of"])
def test_a_run_whose_flops_would_be_others_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys, flag):
    tool = load_tool("benchmark")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu", "--sizes", "1", "32", "2", "--output",
                                      str(tmp_path / "out"), "--", flag, "1"])
    assert tool.main() == 1
    assert f"{flag.partition('=')[0]}: the FLOPs of this run are counted without it" in capsys.readouterr().err


def profiled_steps(trace):
    """Steps of the process that a trace holds."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted({int(event["name"].partition("#")[2]) for event in events
                   if event.get("name", "").startswith("ProfilerStep#")})


@pytest.mark.slow
def test_a_run_is_profiled(tmp_path, fullbatch_arguments, uninterrupted):  # noqa: F811
    def run(*flags, of=(), output="out"):
        return subprocess.run([sys.executable, "tools/profile_training.py", "--output", tmp_path / output, *flags, "--",
                               *map(str, [*fullbatch_arguments, *of])], cwd=ROOT, capture_output=True, text=True)
    done = run("--first-step", "2", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert "matmuls" in done.stdout and done.stdout.rstrip().endswith("rank-0.json.gz")
    again = run()
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "exists; give another" in again.stderr
    folder = shutil.copytree(uninterrupted / "checkpoints", tmp_path / "run")
    before = written(folder)
    of = ["--load", folder, "--save", folder, "--save-interval", 1, "--ckpt-step", 12]
    later = run("--first-step", "3", "--steps", "2", of=of, output="later")
    assert later.returncode == 0, later.stderr
    assert "left out, so that nothing of the run is written: --save" in later.stdout and "step 16/24" in later.stdout
    assert "step 17/24" not in later.stdout and written(folder) == before
    assert profiled_steps(tmp_path / "later" / "torch_profile" / "rank-0.json.gz") == [3, 4]


OTHER_PARTS = "# A\n\n## Training on a GPU\n\nHow.\n{}\n## B\n\n| x |\n|---|\n| 1 |\n"


def test_rows_are_added_to_the_table(tmp_path):
    file = tmp_path / "b.md"
    file.write_text(OTHER_PARTS.format("\nNothing has been measured yet.\n"))
    file.chmod(0o640)
    for speed in ("7", "8|9"):
        add_row(file, {"device": "G", "speed": speed})
    assert file.read_text() == OTHER_PARTS.format("\n| device | speed |\n|---|---|\n| G | 7 |\n| G | 8\\|9 |\n")
    assert file.stat().st_mode & 0o777 == 0o640 and [*tmp_path.iterdir()] == [file]
    before = file.read_text()
    with pytest.raises(ConfigError, match="b.md: the table under .* has other columns; it needs . device . memory ."):
        add_row(file, {"device": "G", "memory": "1"})
    assert file.read_text() == before


def test_a_new_folder_for_the_output_is_as_open_as_another(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "another").mkdir()
    new = output_folder(None)
    assert new.parent == tmp_path and new.stat().st_mode == (tmp_path / "another").stat().st_mode
    assert output_folder(tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("fits, asked, timed", [(9000, 24_576, (6144, 61.44)), (24_576, 24_576, (24_576, 245.76)),
                                                (1000, 24_576, None), (1000, 512, (512, 5.12))])
def test_rows_are_halved_until_they_fit(fits, asked, timed):
    tried = []

    def seconds_of(row_tokens):
        tried.append(row_tokens)
        if row_tokens > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return row_tokens / 100
    assert in_the_longest_row_that_fits(seconds_of, asked) == timed
    assert tried == [asked // 2 ** n for n in range(len(tried))] and tried[-1] >= min(asked, SHORTEST_ROW)


def test_steps_are_compared_pair_by_pair(monkeypatch, capsys):
    """On a machine that gets slower the ratio of medians would be that of steps at different speeds."""
    from hrm_megatron.benchmark import against_transformers

    now, slowness = [0.0], iter([9, 9, 1, 1, 2, 2, 4, 7, 8, 8, 9, 9])  # the first pair warms up; one is disturbed

    def taking(seconds):
        def step():
            now[0] += seconds * next(slowness)
        return lambda *_: step
    monkeypatch.setattr(against_transformers, "our_step", taking(3))
    monkeypatch.setattr(against_transformers, "transformers_step", taking(5))
    monkeypatch.setattr(against_transformers.time, "perf_counter", lambda: now[0])
    assert against_transformers.compare_steps(5, against_transformers.ARCHITECTURE) == pytest.approx(3 / 5)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "pair  1:   3.00 s against   5.00 s, ratio 0.600" and len(said) == 5 + 3
    assert said[-1] == "ratio 0.600, median of 5 pairs from 0.343 to 0.600"


def test_generation_is_compared_on_the_same_weights_and_prompts(capsys):
    from hrm_megatron.benchmark.generation import compare_generation

    compare_generation(["demo"], [1, 3], ["float32"], prompt_tokens=12, new_tokens=4, shortest=None, pairs=1,
                       cpu_time=True)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("greedy, prompts of 6 to 12 tokens, 4 new ones each, 1 pair(s), ") and " GB/s" in head
    assert [row.split(" tokens/s")[0].split()[:4] for row in rows] == [
        ["demo", "float32", "batch", "1"], ["demo", "float32", "batch", "3"]]
    assert rows[0].endswith("same answers 1 of 1") and rows[1].endswith("same answers 3 of 3")


def test_answers_of_mixed_length_are_those_asked_for_on_both_sides(capsys):
    from hrm_megatron.benchmark.generation import compare_generation, random_work

    compare_generation(["demo"], [2], ["float32"], prompt_tokens=12, new_tokens=9, shortest=2, pairs=1, cpu_time=True)
    head, row = capsys.readouterr().out.splitlines()
    assert "2 to 9 new ones, 3 prompts for each place in a batch" in head
    assert row.endswith("same answers 6 of 6") and "first token" not in row
    work = random_work(2, 12, 9, 2, 400)
    assert len(work.prompts) == 6 and len(set(work.new_tokens)) > 1 and set(work.new_tokens) <= {*range(2, 10)}
    assert [tokens for part in work.batches() for tokens in part.new_tokens] == work.new_tokens


def test_the_bound_of_generation_counts_what_a_cached_decoder_must_do():
    """By hand, one layer a stack: a rate of one operation and one byte per second."""
    from hrm_megatron.benchmark.generation import fastest_seconds, random_tensors
    from hrm_megatron.config import Architecture
    from hrm_megatron.generate.weights import take_weights

    h, ffn, vocab, ticks = 64, 128, 256, 8
    architecture = Architecture(1, h, 1, ffn, vocab)
    weights = take_weights(architecture, random_tensors(architecture).items())
    body, head = ticks * (5 * h * h + 3 * h * ffn), h * vocab
    cached = ticks * 2 * h * 4  # bytes of a position
    prompts, later = 3 + 5, 2  # three tokens each: the first comes with the prompts
    positions = (3 + 1 + 5 + 1) + (3 + 2 + 5 + 2)
    assert fastest_seconds(weights, [[1] * 3, [1] * 5], 3, 1.0, 1.0) == (
        2 * (prompts * body + 2 * head) + later * max(2 * 2 * (body + head), 4 * (body + head)) + positions * cached)


@pytest.mark.slow
def test_the_tool_measures_and_says_what_failed(tmp_path):
    def run(*flags):
        sizes = ["--sizes", "2", "64", "4", "--row-tokens", "256", "--rows", "2", "--steps", "2", "--vocab-size", "512"]
        return subprocess.run(
            [sys.executable, "tools/benchmark.py", "gpu", *sizes, "--peak-size", "256", "--output", tmp_path / "out",
             *flags], cwd=ROOT, capture_output=True, text=True, umask=0o027)
    failed = run("--", "--bp-min-steps", "9")
    assert failed.returncode == 1 and "error: the run failed: error: bp_steps=9 does not fit" in failed.stderr
    (tmp_path / "out").rename(tmp_path / "failed")
    missing = run("--record", tmp_path / "none.md")
    assert missing.returncode == 1 and "none.md: has no line '## Training on a GPU'" in missing.stderr
    assert not (tmp_path / "out").exists()  # nothing was run for it
    table = tmp_path / "benchmarks.md"
    table.write_text("# Benchmarks\n\n## Training on a GPU\n\nNothing has been measured yet.\n")
    done = run("--peer", "--record", table)
    assert done.returncode == 0, done.stderr
    *_, row = table.read_text().splitlines()
    assert "megatron-core 0" in row and "python tools/benchmark.py gpu --sizes 2 64 4" in row
    speeds = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("tokens/s", "transformers "))]
    assert [row.split(" | ")[3], row.split(" | ")[8].removesuffix(" |")] == speeds
    assert [line.split()[0] for line in done.stdout.splitlines()[2:5]] == ["tokens/s", "TFLOP/s", "peak"]
    assert "matmuls" in done.stdout and "\ntransformers " in done.stdout
    assert not wrong_modes(tmp_path / "out", 0o027)


@pytest.mark.slow
def test_conversions_are_measured_in_every_direction(single_rank, tmp_path, capsys, monkeypatch):
    """Beside a process group that is alive, as in a program that trains."""
    tool = runpy.run_path(str(ROOT / "tools" / "benchmark.py"))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "convert", "--sizes", "1", "64", "4", "--vocab-size", "40000",
                                      "--output", str(tmp_path)])
    assert tool["main"]() == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    weights = 2 * 64 * (40_192 + 5 * 64 + 3 * 256) * 4 / 1e9  # rows of 40,000 tokens, padded
    assert f"{weights:.2f} GB of weights in fp32" in head
    measured = {tuple(line.rsplit(maxsplit=3)[0].split(" > ")): [float(value) for value in line.rsplit(maxsplit=3)[1:]]
                for line in lines}
    assert measured.keys() == {("random weights", "native"), ("hf", "gguf"),
                               *itertools.permutations(("native", "megatron", "hf"), 2)}
    for (source, target), (seconds, peak_gb, written_gb) in measured.items():
        copies = {"hf": 1, "gguf": 1, "native": 4, "megatron": 1 if source == "hf" else 5}[target]
        assert seconds > 0 and peak_gb < 5 * weights and written_gb == pytest.approx(copies * weights, abs=0.01)
    assert not [*tmp_path.iterdir()]
    found = [*measure_conversion(Architecture(1, 64, 4, 256, 256), tmp_path, weights_only=True)]
    assert [(one.source, one.target) for one in found] == [("random weights", "hf"), ("hf", "megatron"),
                                                           ("megatron", "hf"), ("hf", "gguf")]
    assert not [*tmp_path.iterdir()]
