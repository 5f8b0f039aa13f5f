"""The Python that `make` takes is found wherever HOME points, if it does at all."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def find(tmp_path):
    """Run find-python where the only one that works is pyenv's in the home that the password database names."""
    commands, home = tmp_path / "bin", tmp_path / "home"
    python = home / ".pyenv" / "versions" / "3.12.99" / "bin" / "python"
    python.parent.mkdir(parents=True)
    commands.mkdir()
    for name in ("python3.12", "python3.13", "python3", "uv"):
        script(commands / name, "exit 1")
    script(commands / "getent", f'[ "$*" = "passwd {os.getuid()}" ] && echo "me:x:1:1::{home}:/bin/sh"')
    script(python, f"echo {python}")

    def run(**environment):
        done = subprocess.run([ROOT / ".ci" / "find-python"], capture_output=True, text=True,
                              env={"PATH": f"{commands}:{os.environ['PATH']}", **environment})
        return done.returncode, done.stdout.strip(), done.stderr
    return run, str(python)


def script(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("environment", [{}, {"HOME": "/nowhere"}, {"HOME": "/nowhere", "PYENV_ROOT": "/nowhere"}])
def test_pyenv_is_found_wherever_home_points(find, environment):
    run, python = find
    assert run(**environment) == (0, python, "")


def test_a_python_that_is_named_comes_first(find):
    run, _ = find
    assert run(PYTHON=sys.executable)[:2] == (0, sys.executable)
