"""The script for a user's own data goes all the way, and goes on where it stopped."""
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.modes import wrong_modes

ROOT = Path(__file__).parents[2]
UMASK = 0o077  # nobody else may read


def run(command, cwd=ROOT, **environment):
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
                          umask=UMASK)


SCRIPT = ROOT / "examples" / "own_data.sh"
SETTINGS = dict(OUT="out", VOCAB_SIZE="300", ROW_TOKENS="64", ROWS_PER_STEP="2", TRAIN_ITERS="2", WORKERS="1")
FIELDS = dict(JSON_KEYS="tags q a", ON_BAD_ROW="skip", DEFAULT_CONDITION="direct")


@pytest.fixture
def folder(tmp_path):
    """A folder to stand in, with rows of other names, without conditions, and one that is broken."""
    rows = [json.dumps(dict(q=f"What is {i} + 1?", a=str(i + 1))) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{"]) + "\n")
    return tmp_path


@pytest.fixture
def launcher(folder, commands):
    """Stand-ins for what takes long, in the environment of the script: they say what they were called with."""
    python, torchrun = folder / "python", folder / "torchrun"
    python.write_text('#!/bin/sh\ncase $1 in *convert*) echo "convert $*";; -m) echo "train by $*";; '
                      f'*) exec {commands.python} "$@";; esac\n')
    torchrun.write_text('#!/bin/sh\necho "train $*"\n')
    for program in (python, torchrun):
        program.chmod(0o755)
    return dict(PYTHON=str(python), TORCHRUN=str(torchrun))


def test_own_data_becomes_an_exported_model(folder, commands):
    tiny = ["--num-layers", 1, "--hidden-size", 32, "--num-attention-heads", 2, "--eval-iters", 1]
    done = run([SCRIPT, *tiny], folder, DATA="rows.jsonl", **commands.environment, **SETTINGS, **FIELDS)
    assert done.returncode == 0, done.stderr[-2000:]
    out = folder / "out"
    assert (out / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (out / "hf").iterdir()}
    assert "The model is in out/hf" in done.stdout
    assert done.stdout.count("skipped 1: broken JSON, first rows.jsonl:41: ") == 2  # by either tool
    assert "40 rows have no condition and took the default" in done.stdout
    assert not wrong_modes(out, UMASK)


def snapshot(out):
    """Contents of all files but locks, by path."""
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_second_start_keeps_what_is_there_and_other_data_is_refused(folder, launcher):
    first, again = (run([SCRIPT, "--bf16"], folder, DATA="rows.jsonl", **SETTINGS, **FIELDS, **launcher)
                    for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert again.stdout.startswith("out/tokenizer: made from the same input before, kept\n")
    assert "\nsources: 1 kept\n" in again.stdout and "\nsources: 1 added (rows.jsonl)\n" in first.stdout
    assert first.stdout.count(" --bf16\n") == again.stdout.count(" --bf16\n") == 1
    made = snapshot(folder / "out")
    (folder / "more.jsonl").write_text((folder / "rows.jsonl").read_text() * 2)
    for changed in (dict(DATA="more.jsonl"), dict(VOCAB_SIZE="301"), dict(ROW_TOKENS="65"),
                    dict(DEFAULT_CONDITION="cot")):
        done = run([SCRIPT], folder, **{**SETTINGS, **FIELDS, **launcher, "DATA": "rows.jsonl", **changed})
        assert done.returncode == 1 and "train " not in done.stdout, changed
        assert done.stderr.splitlines()[-1].startswith("error: out/"), done.stderr  # behind what the engine says
        assert "name another output" in done.stderr or "choose another --output-prefix" in done.stderr
    assert made == snapshot(folder / "out")


def test_any_kind_of_input_will_do(folder, launcher):
    """A folder of chats, packed and in columns."""
    chats = [dict(messages=[dict(role="user", content=f"What is {i} + 1?"), dict(role="assistant", content=str(i + 1))])
             for i in range(6)]
    (folder / "in").mkdir()
    (folder / "in" / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, chats)).encode()))
    pq.write_table(pa.Table.from_pylist(chats), folder / "in" / "b.parquet")
    done = run([SCRIPT], folder, DATA="in", **SETTINGS, **launcher, DEFAULT_CONDITION="direct", ROW_SHAPE="messages")
    assert done.returncode == 0, done.stderr
    assert "out/data: 12 examples, " in done.stdout and "train " in done.stdout
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("It rained on Friday. Nobody came. " * 40)
    done = run([SCRIPT], folder, DATA="texts", **{**SETTINGS, **launcher, "OUT": "two", "SPLIT_SENTENCES": "1"})
    assert done.returncode == 0 and " 0 responses truncated" in done.stdout, done.stderr
    assert (folder / "two" / "sentences" / "abbrev_types.txt").exists()
    (folder / "long.jsonl").write_text(json.dumps(dict(instruction="a?", response="b", context="c", system="d")))
    for ignored, status in (("context system", 0), ("", 1)):
        done = run([SCRIPT], folder, DATA="long.jsonl", IGNORE_FIELDS=ignored, DEFAULT_CONDITION="direct",
                   **{**SETTINGS, **launcher, "OUT": "three"})
        assert done.returncode == status, done.stderr


def test_rows_without_condition_are_refused_unless_told(folder, launcher):
    done = run([SCRIPT], folder, DATA="rows.jsonl", **{**SETTINGS, **FIELDS, **launcher, "DEFAULT_CONDITION": "refuse",
                                                      "ON_BAD_ROW": "error"})
    assert (done.returncode, done.stdout) == (1, "")
    assert "\nerror: rows.jsonl:1: no field 'tags'" in done.stderr and "--default-condition" in done.stderr
    assert not (folder / "out").exists()


def test_help_shows_the_settings_and_needs_none(tmp_path):
    done = run([SCRIPT, "--help"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    settings = [line.removeprefix("export ").partition("=")[0] for line in done.stdout.splitlines() if "=${" in line]
    assert {"DATA", *SETTINGS, *FIELDS, "ROW_SHAPE", "IGNORE_FIELDS", "SPLIT_SENTENCES", "PRESET", "LR",
            "PYTHON"} == set(settings)
    assert "root=" not in done.stdout
    shutil.copy(SCRIPT, tmp_path)
    for script, message in ((SCRIPT, "set DATA to your file or folder"), (tmp_path / SCRIPT.name, "no tools/")):
        refused = run([script], tmp_path)
        assert refused.returncode == 1 and refused.stderr.startswith(f"own_data.sh: {message}")
        assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(("flags", "message"), [
    (["--save", "elsewhere"], "--save is this script's: set OUT=... instead"),
    (["--bf16", "--load=elsewhere"], "--load is this script's: set OUT=... instead"),
    (["--tensorboard-dir", "x"], "--tensorboard-dir is this script's: set OUT=... instead"),
    (["--data-path", "x"], "--data-path is this script's: set DATA=... and OUT=... instead"),
    (["--tokenizer-model", "x"], "--tokenizer-model is this script's: set OUT=... instead, or name your own in a "
                                 "copy of this file"),
])
def test_places_that_the_script_exports_from_are_its_own(folder, launcher, flags, message):
    done = run([SCRIPT, *flags], folder, DATA="rows.jsonl", **SETTINGS, **FIELDS, **launcher)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"own_data.sh: {message}\n")
    assert not (folder / "out").exists()


def test_the_best_iteration_of_a_run_with_early_stopping_is_exported(folder, launcher):
    Path(launcher["TORCHRUN"]).write_text(
        '#!/bin/sh\nmkdir -p out/checkpoints/iter_0000003\n'
        'echo \'{"best_iteration": 3}\' > out/checkpoints/early_stopping.json\n')
    stopping = run([SCRIPT, "--early-stopping", 1], folder, DATA="rows.jsonl", **SETTINGS, **FIELDS, **launcher)
    assert stopping.returncode == 0, stopping.stderr
    converted, _, asked = stopping.stdout.splitlines()[-3:]
    assert converted.startswith("convert ") and " --ckpt-step 3 " in converted and " --ckpt-step 3 " in asked
    # One that goes on from there without it has a later model, of which the record says nothing.
    assert "--ckpt-step" not in run([SCRIPT], folder, DATA="rows.jsonl", **SETTINGS, **FIELDS, **launcher).stdout


def test_what_trains_nothing_exports_nothing_and_one_python_does_every_step(folder, launcher):
    rows = dict(SETTINGS, **FIELDS, DATA="rows.jsonl", OUT="out/")
    for flag in ("--dry-run", "--skip-train", "--print-config"):
        done = run([SCRIPT, flag], folder, **rows, **launcher)
        assert done.returncode == 0 and "hrm_megatron.pretrain" in done.stdout, done.stderr
        assert "convert" not in done.stdout and "The model is in" not in done.stdout
    done = run([SCRIPT], folder, **rows, PYTHON=launcher["PYTHON"], TORCHRUN="")
    assert done.returncode == 0, done.stderr
    assert "\ntrain by -m torch.distributed.run --standalone " in done.stdout and "\nconvert " in done.stdout
    assert "//" not in done.stdout and "The model is in out/hf." in done.stdout


def test_without_a_venv_the_python_on_path_will_do(folder):
    root, programs = folder / "root", folder / "bin"
    for place in (root, programs):
        place.mkdir()
    for name in ("examples", "launch_scripts", "tools"):
        (root / name).mkdir()
        for path in (ROOT / name).iterdir():
            (root / name / path.name).symlink_to(path)
    python = programs / "python"
    settings = dict(SETTINGS, **FIELDS, DATA="rows.jsonl", PYTHON="", TORCHRUN="", PATH=f"{programs}:/usr/bin:/bin")
    for options, code in (("", 0), ("-I -S", 1)):  # with and without what is installed
        python.write_text(f'#!/bin/sh\ncase $1 in -c) exec {sys.executable} {options} "$@";; *) echo "$1";; esac\n')
        python.chmod(0o755)
        done = run([root / "examples" / "own_data.sh"], folder, **settings)
        assert done.returncode == code, done
    assert done.stdout == "" and done.stderr == ("own_data.sh: PYTHON=python does not find megatron, tokenizers and "
                                                 "torch: run make setup, or set PYTHON\n")


def test_the_launch_script_says_where_no_launcher_is(tmp_path):
    script = shutil.copy(ROOT / "launch_scripts" / "train_node.sh", tmp_path)  # with no .venv beside it
    for named, launcher in (("", "torchrun"), ("nowhere/torchrun", "nowhere/torchrun")):
        done = run([script], tmp_path, PYTHON="", PATH="/usr/bin:/bin", TORCHRUN=named)
        assert (done.returncode, done.stdout) == (127, "")
        assert done.stderr == f"train_node.sh: no {launcher}: run make setup, or set TORCHRUN or PYTHON\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_script_alone_ends_its_command_too(folder, launcher, number):
    """The stand-in for torchrun signals the script, and ends when it is ended."""
    Path(launcher["PYTHON"]).write_text("#!/bin/sh\n")
    Path(launcher["TORCHRUN"]).write_text(
        f"#!/bin/sh\ntrap 'echo ended; exit 1' TERM\nkill -{int(number)} $PPID\nwhile :; do sleep 0.05; done\n")
    start = f"import os, signal, sys\nsignal.signal({int(number)}, signal.SIG_DFL)\nos.execv(sys.argv[1], sys.argv[1:])"
    done = run([sys.executable, "-c", start, SCRIPT], folder, DATA="rows.jsonl", **SETTINGS, **FIELDS, **launcher)
    assert done.returncode == 128 + number and done.stdout.endswith("ended\n"), done


def test_the_launch_script_shows_its_command_and_refuses_what_does_not_fit():
    shown = run(["launch_scripts/train_node.sh", "--dry-run", "--save", "runs/a b"], PRESET="L", TP="2", DP="3",
                TORCHRUN="torchrun")
    assert shown.returncode == 0
    assert "--nproc-per-node 6 -m hrm_megatron.pretrain --hrm-preset L --tensor-model-parallel-size 2" in shown.stdout
    assert r"--sequence-parallel --save runs/a\ b" in shown.stdout
    helped = run(["launch_scripts/train_node.sh", "--help"])
    assert helped.returncode == 0 and "DP      data parallel size" in helped.stdout and "#" not in helped.stdout
    for variables, message in ((dict(TP="two"), "whole numbers from 1, not 'two'"),
                               (dict(LAYOUT="preset", DP="2"), "LAYOUT=preset chooses TP, PP, CP and DP: leave them"),
                               (dict(LAYOUT="best"), "LAYOUT=best: the only one that is known is preset")):
        refused = run(["launch_scripts/train_node.sh", "--dry-run"], **variables)
        assert refused.returncode == 2 and message in refused.stderr


def test_the_launch_script_takes_the_layout_of_a_preset_for_the_gpus_that_there_are(tmp_path):
    from hrm_megatron.planner.presets import default_layout, layout_flags

    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nseq 8\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    shown = run(["launch_scripts/train_node.sh", "--dry-run", "--bf16"], PRESET="20B", LAYOUT="preset",
                TORCHRUN="torchrun", PYTHON=sys.executable, PATH=f"{tmp_path}:{os.environ['PATH']}")
    flags = " ".join(layout_flags(default_layout("20B", 8)))
    assert f"--nproc-per-node 8 -m hrm_megatron.pretrain --hrm-preset 20B {flags} --bf16" in shown.stdout, shown
