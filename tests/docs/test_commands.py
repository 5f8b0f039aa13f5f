"""What README and docs tell users to type: run where a CPU can, else parsed as the machines that they name would."""
from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from hrm_megatron.config import PRESETS, PUBLISHED, Architecture
from hrm_megatron.planner.layout import Layout
from hrm_megatron.planner.memory import Saving, memory_of_stages
from hrm_megatron.training.micro_batch import POSITIONS
from tests.docs.commands import ROOT, blocks, documents, table

BLOCKS = blocks()
VOCAB_SIZE, BP_STEPS = 65_536, 5
# Programs of the machines that the texts are about: each notes its arguments, one JSON list a line, and does nothing.
NOTE = """#!{python}
import json, os, sys
if {{"hrm_megatron.cluster", "hrm_megatron.planner.presets"}} & {{*sys.argv}}:  # what launch scripts ask
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
with open(os.environ["NOTES"], "a") as notes:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=notes)
"""
SBATCH = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do case $1 in
    --exclusive) shift; continue ;;
    --nodes) export SLURM_NNODES=$2 ;; --gpus-per-node) export SLURM_GPUS_ON_NODE=$2 ;;
esac; shift 2; done
SLURM_JOB_ID=1 SLURM_JOB_NODELIST=nodes SLURM_SUBMIT_DIR=$PWD exec "$@"
"""
SCONTROL = "#!/usr/bin/env bash\necho node1\n"
SQUEUE = "#!/usr/bin/env bash\necho RUNNING None\n"
GPUS = "#!/usr/bin/env bash\nfor ((i = 0; i < {gpus}; i++)); do echo GPU $i; done\n"
# A rank that says how its arguments were understood, and trains nothing.
PARSE_ONLY = """
import json, os, sys
os.environ["WORLD_SIZE"] = "{gpus}"
from hrm_megatron import pretrain
from hrm_megatron.training.arguments import microbatches_of
stock = pretrain.parse_arguments
def parse_arguments(*_):
    args = stock(lambda args: {vocab_size}, lambda args: 1000)  # rows of an epoch
    print("understood", json.dumps([args.global_batch_size, args.seq_length, microbatches_of(args)]), flush=True)
    sys.exit(0)
pretrain.parse_arguments = parse_arguments
"""


def test_every_block_says_how_it_is_tested():
    assert len(BLOCKS) > 5
    for block in BLOCKS:
        assert block.how in ("make", "cpu") or block.gpus or re.fullmatch(r"not run, .{5,}", block.how), block.place


def test_make_has_the_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [name for block in BLOCKS if block.how == "make" for name in re.findall(r"^make (\w+)", block.text, re.M)]
    assert named and set(named) <= targets


def test_every_job_that_trains_asks_for_its_cores():
    """Without either flag Slurm gives one core for all ranks of a node, which the script refuses once it runs."""
    jobs = [flags for path in [*documents(), ROOT / "launch_scripts" / "train_slurm.sh"]
            for flags in re.findall(r"\bsbatch ((?:\\\n|.)*?)launch_scripts/train_slurm\.sh", path.read_text())]
    assert len(jobs) >= 5
    assert [flags for flags in jobs if not {"--exclusive", "--cpus-per-task"} & {*flags.split()}] == []


@pytest.fixture
def place(tmp_path):
    """A folder with the project's files in it, whose `runs` is its own."""
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", ".venv", ".git"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


@pytest.mark.timeout(1800)
def test_what_a_cpu_can_run_works_from_top_to_bottom(place, commands):
    (place / ".venv").unlink()
    (place / ".venv").mkdir()
    (place / ".venv" / "bin").symlink_to(commands.folder)
    script = "\n".join(block.text for block in BLOCKS if block.how == "cpu")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=place, capture_output=True, text=True,
                          env={**os.environ, **commands.environment, "PYTHONPATH": str(ROOT)}, timeout=1780)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (place / "runs" / "tiny" / "hf").iterdir()}
    assert (place / "runs" / "back" / "train_metadata.yaml").exists()


def understood(launch, arguments, gpus):
    """(global batch, row length, micro-batches) that a run with these arguments has on so many GPUs."""
    run = launch(*arguments, prelude=PARSE_ONLY.format(gpus=gpus, vocab_size=VOCAB_SIZE))
    assert run.code == 0, run.output[-2000:]
    return json.loads(re.search("^understood (.*)$", run.output, re.MULTILINE)[1])


def training_arguments(block, gpus, place, folder):
    """The arguments of hrm_megatron.pretrain that the commands of a block lead to on so many GPUs."""
    folder.mkdir()
    programs = dict.fromkeys(("torchrun", "srun", "python"), NOTE.format(python=sys.executable))
    programs |= {"sbatch": SBATCH, "scontrol": SCONTROL, "squeue": SQUEUE, "nvidia-smi": GPUS.format(gpus=gpus)}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (place / "runs").mkdir(exist_ok=True)
    (place / "runs" / "rows.jsonl").touch()
    notes = folder / "notes"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=place, capture_output=True, text=True, timeout=280,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(notes), "NODE_RANK": "0",
             "FIRST_NODE": "node1", "TORCHRUN": str(folder / "torchrun"), "PYTHON": str(folder / "python"),
             "PREFLIGHT": "0"})
    assert done.returncode == 0, done.stderr
    commands = [json.loads(line) for line in notes.read_text().splitlines()]
    return [command[command.index("hrm_megatron.pretrain") + 1:] for command in commands
            if "hrm_megatron.pretrain" in command]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.gpus], ids=lambda block: block.place)
def test_what_needs_gpus_is_understood_there(launch, place, tmp_path, block):
    for gpus in block.gpus:
        for arguments in training_arguments(block, gpus, place, tmp_path / f"bin{gpus}"):
            batch, _, microbatches = understood(launch, arguments, gpus)
            assert batch and microbatches


ROWS = table(ROOT / "README.md", "preset")


def test_every_preset_of_the_reference_has_a_row():
    assert [row["preset"] for row in ROWS] == [name for name, preset in PRESETS.items() if preset.sizes == PUBLISHED]


def gigabytes_of(architecture, gpus, rows, row_tokens):
    layout = Layout(gpus, row_tokens=row_tokens, micro_batch_size=rows)
    (memory,) = memory_of_stages(architecture, layout, [architecture.num_layers], Saving(BP_STEPS, gated_act=True))
    return memory.total / 1e9


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["preset"])
def test_launch_settings_start_and_take_what_they_say(launch, row):
    preset = PRESETS[row["preset"]]
    architecture = Architecture(preset.num_layers, preset.hidden_size, preset.num_attention_heads,
                                preset.ffn_hidden_size, VOCAB_SIZE)
    assert row["parameters"] == f"{architecture.num_parameters / 1e9:.2f} B"
    rows, row_tokens = int(row["--micro-batch-size"]), int(row["--seq-length"])
    flags = ["--hrm-preset", row["preset"], "--seq-length", row_tokens, "--micro-batch-size", rows, "--bf16",
             "--train-iters", 10, "--data-path", "any", "--recompute-granularity", "selective",
             "--recompute-modules", "gated_act"]
    if row["--global-batch-size"] != "preset":
        flags += ["--global-batch-size", row["--global-batch-size"]]
    gpu_counts = [int(count) for count in row["GPUs"].split(",")]
    gigabytes = [float(amount) for amount in row["GB on a GPU"].split(",")]
    for gpus, amount in zip(gpu_counts, gigabytes, strict=True):
        batch, _, microbatches = understood(launch, flags, gpus)
        assert batch == microbatches * rows * gpus
        if row["--global-batch-size"] == "preset":
            assert batch * row_tokens == preset.tokens_per_step
        assert amount == round(gigabytes_of(architecture, gpus, rows, row_tokens), 1) < 80
    # Of those that divide the step on all of these GPUs, and fit.
    fit = [one for one in range(1, batch + 1) if not any(batch % (one * gpus) for gpus in gpu_counts) and all(
        gigabytes_of(architecture, gpus, one, row_tokens) < 80 for gpus in gpu_counts)]
    assert rows == next((one for one in fit if one * row_tokens >= POSITIONS), fit[-1])


TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
SCRIPTS = ["launch_scripts/train_node.sh", "launch_scripts/train_slurm.sh", "launch_scripts/preprocess_slurm.sh",
           "examples/own_data.sh"]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_answers_help(monkeypatch, capsys, tool):
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    assert not ended.value.code and "usage:" in capsys.readouterr().out


def test_the_demo_answers_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / "demo" / "run.py"), run_name="__main__")
    assert not ended.value.code and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_answers_help(tmp_path: Path, script):
    shown = subprocess.run([ROOT / script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert shown.returncode == 0 and shown.stdout.strip() and not shown.stderr
