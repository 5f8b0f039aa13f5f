"""The script for a user's own data goes all the way, and goes on where it stopped."""
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.modes import wrong_modes

ROOT = Path(__file__).parents[2]
UMASK = 0o077  # nobody else may read


def run(command, **environment):
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
                          umask=UMASK)


def test_own_data_becomes_an_exported_model(tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows = [dict(condition="direct", instruction=f"What is {i} + 1?", response=str(i + 1)) for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dict(DATA=str(data), OUT=str(out), VOCAB_SIZE="300", ROW_TOKENS="64", ROWS_PER_STEP="2", TRAIN_ITERS="2",
                    TORCHRUN=str(Path(sys.executable).with_name("torchrun")))
    tiny = ["--num-layers", 1, "--hidden-size", 32, "--num-attention-heads", 2, "--eval-iters", 1]
    done = run(["examples/own_data.sh", *tiny], **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (out / "hf").iterdir()}
    assert f"The model is in {out}/hf" in done.stdout
    assert not wrong_modes(out, UMASK)


def test_the_launch_script_shows_its_command_and_refuses_what_does_not_fit():
    shown = run(["launch_scripts/train_node.sh", "--dry-run", "--save", "runs/a b"], PRESET="L", TP="2", DP="3",
                TORCHRUN="torchrun")
    assert shown.returncode == 0
    assert "--nproc-per-node 6 -m hrm_megatron.pretrain --hrm-preset L --tensor-model-parallel-size 2" in shown.stdout
    assert r"--sequence-parallel --save runs/a\ b" in shown.stdout
    helped = run(["launch_scripts/train_node.sh", "--help"])
    assert helped.returncode == 0 and "DP      data parallel ranks" in helped.stdout and "#" not in helped.stdout
    refused = run(["launch_scripts/train_node.sh", "--dry-run"], TP="two")
    assert refused.returncode == 2 and "whole numbers from 1, not 'two'" in refused.stderr
