"""A preprocessing that is killed at any event and started again ends with the bytes of one that nobody touched."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.stores import files_of

ROOT = Path(__file__).parents[2]
SEED = 20
# Counts what happens to the files of the dataset (Python audits each call), and what is written, and dies at one count.
PROGRAM = """
import json, os, signal, sys
from hrm_megatron.data import folder_lock, shards
from hrm_megatron.data.preprocess import preprocess
from hrm_megatron.data.tokenizer import TextTokenizer
from pathlib import Path
prefix, folder, tokenizer, fatal, workers = sys.argv[1:]
events = 0
def happened(*_):
    global events
    events += 1
    if events == int(fatal):
        os.kill(os.getpid(), signal.SIGKILL)
def audit(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock"):
        path = str(arguments[0])
        if event == "fcntl.flock" or path.startswith(prefix):
            happened()
write = shards._HashedFile.write
shards._HashedFile.write = lambda self, values: (happened(), write(self, values), happened())
tokenizer = TextTokenizer(tokenizer)
if __name__ == "__main__":
    sys.addaudithook(audit)
    preprocess(sorted(Path(folder).glob("*.jsonl")), prefix, tokenizer, int(workers), chunk_bytes=300)
    print(events)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """A function that runs the program, the number of events of an undisturbed run, and the files that it makes."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "in").mkdir()
    (folder / "program.py").write_text(PROGRAM)
    for name, count in (("a", 7), ("b", 11), ("c", 3), ("same", 7)):
        rows = [dict(condition="", instruction=f"What is {name[:1]} + {i}?", response="y" * i + "!")
                for i in range(count)]
        (folder / "in" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(prefix, fatal=0, workers=1):
        command = [sys.executable, folder / "program.py", prefix, folder / "in", tokenizer.path, str(fatal),
                   str(workers)]
        return subprocess.run(command, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})

    done = run(folder / "undisturbed" / "x")
    assert done.returncode == 0, done.stderr
    return run, int(done.stdout), files_of(folder / "undisturbed" / "x")


def check(made, tmp_path, counts, workers=1):
    run, _, whole = made
    for count in counts:
        prefix = tmp_path / f"{count}" / "x"
        killed = run(prefix, count, workers)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        again = run(prefix, workers=workers)
        assert again.returncode == 0, again.stderr
        assert files_of(prefix) == whole, count
        assert not [path for path in Path(f"{prefix}.shards").iterdir() if path.name.startswith("partial")]


def test_killed_three_times(made, tmp_path):
    _, events, _ = made
    assert events > 60
    check(made, tmp_path, np.random.default_rng(SEED).integers(1, events, 3).tolist())


@pytest.mark.slow
def test_killed_twenty_times(made, tmp_path):
    _, events, _ = made
    check(made, tmp_path, np.random.default_rng(SEED + 1).choice(np.arange(1, events + 1), 20, replace=False).tolist())


@pytest.mark.slow
def test_killed_while_workers_are_busy(made, tmp_path):
    """`run` returns when the killed process and its workers, who hold its output open, have ended."""
    _, events, _ = made
    check(made, tmp_path, [events // 3], workers=2)


@pytest.mark.slow
def test_killed_again_and_again(made, tmp_path):
    """Each run dies a few events after it has begun to write, until one is through."""
    run, events, whole = made
    prefix = tmp_path / "x"
    for fatal in range(20, 20 * events, 20):
        if run(prefix, fatal).returncode == 0:
            break
    assert files_of(prefix) == whole
