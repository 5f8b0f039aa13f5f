"""Commands that are forked are started, and end, as by Python. Signals: the server of README's commands is stopped by
one."""
import os
import subprocess
import sys

import pytest

from tests.warm import ROOT


def run(commands, *words, **options):
    return subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=200,
                          env={**os.environ, **commands.environment}, **options)


@pytest.mark.parametrize("flags", [["--help"], ["--no-such-flag"], []])
def test_a_command_says_and_returns_what_it_does_by_python(commands, tmp_path, flags):
    tool = ROOT / "tools" / "preprocess_data.py"
    ours, theirs = (run(commands, python, tool, *flags, cwd=tmp_path) for python in (commands.python, sys.executable))
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


def test_a_module_reads_its_folder_and_its_streams(commands, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"condition": "direct", "instruction": "a", "response": "b"}\n')
    done = run(commands, commands.python, ROOT / "tools" / "train_tokenizer.py", "--input", "rows.jsonl", "--output",
               "made", "--vocab-size", 300, cwd=tmp_path, umask=0o077)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made" / "tokenizer.json").stat().st_mode & 0o777 == 0o600


def test_anything_else_is_left_to_python(commands):
    done = run(commands, commands.python, "-c", "import sys; print(sys.stdin.read(), sys.executable); sys.exit(3)",
               input="said")
    assert (done.returncode, done.stdout) == (3, f"said {sys.executable}\n")
