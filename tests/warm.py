"""Commands of the project, run by processes forked from one that has imported everything: seconds less for each.

`Commands` starts that process and writes programs named `python` and `torchrun` into a folder. What they run is what
the real ones would: the same file or module, arguments, environment, folder and streams. Anything else, such as
`python -c`, they leave to the real Python. What a first import prints is not seen here.
"""
from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.forked import run_and_exit

ROOT = Path(__file__).parents[1]
MESSAGE_BYTES = 1 << 18  # most of a message: arguments and environment
ACTIVATE = 'PATH={folder}:"$PATH"\n'
# What a command is started by: it hands over all that a process has, passes signals on, and ends as the command does.
# A socket's path may have 107 bytes, so it is named from within its folder.
STARTER = """#!{python} -SEs
import json, os, signal, socket, sys
FOLDER, ROOT, PYTHON = {folder!r}, {root!r}, {python!r}
name, given = os.path.basename(sys.argv[0]), sys.argv[1:]
words = ["-m", "torch.distributed.run", *given] if name == "torchrun" else given
while words[:1] == ["-u"]:
    words = words[1:]
module = words[:1] == ["-m"] and words[1:2] and words[1] or ""
script = words and os.path.realpath(words[0]) or ""
if not (module == "torch.distributed.run" or module.split(".")[0] == "hrm_megatron"
        or script.startswith((ROOT + "/tools/", ROOT + "/examples/"))):
    os.execv(PYTHON, [PYTHON, *given])
order = dict(words=words, folder=os.getcwd(), environment=dict(os.environ), mask=os.umask(0), python=FOLDER + "/python")
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
os.chdir(FOLDER)
server.connect("socket")
socket.send_fds(server, [json.dumps(order).encode()], [0, 1, 2])
process = int(server.recv(64))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: os.kill(process, number))
os._exit(int(server.recv(64) or 70))
"""


class Commands:
    """The programs in `folder`, and the process behind them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, str(folder / "python")
        text = STARTER.format(python=sys.executable, folder=str(folder), root=str(ROOT))
        for name in ("python", "torchrun"):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "activate").write_text(ACTIVATE.format(folder=folder))
        self.process = subprocess.Popen([sys.executable, "-m", __name__, str(folder)], cwd=ROOT, text=True,
                                        stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which scripts and launchers find these programs."""
        return {"PYTHON": self.python, "PYTHON_EXEC": self.python, "TORCHRUN": str(self.folder / "torchrun"),
                "OMP_NUM_THREADS": "1"}

    def close(self) -> None:
        """End the process and every command that is still running."""
        self.process.terminate()
        self.process.communicate()


def _become(order: dict, streams: list[int]) -> None:
    """Run one command in this process."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    os.umask(order["mask"])
    sys.stdout.reconfigure(line_buffering=bool(os.environ.get("PYTHONUNBUFFERED")))
    sys.executable = order["python"]
    words = order["words"]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], order["folder"]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        logging.root.handlers.clear()  # of Megatron's training, which no script imports
        logging.root.setLevel(logging.WARNING)
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.realpath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


def _answer(connection: socket.socket) -> None:
    """Run the command that a starter hands over, and tell it the process and the exit status."""
    def work() -> None:
        message, streams, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
        connection.send(str(os.getpid()).encode())
        _become(json.loads(message), streams)

    def report(status: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # the starter was killed
            connection.send(str(status).encode())
    run_and_exit(work, report)


def main() -> None:
    from tests.launch import prepare

    prepare()
    for name in ("transformers.models.hrm_text", "hrm_megatron.generate.session", "hrm_megatron.quantize.job",
                 "torch.distributed.run"):
        importlib.import_module(name)
    os.chdir(sys.argv[1])
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind("socket")
    server.listen(64)
    started: list[int] = []

    def end(*_: object) -> None:
        for number in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)
        os._exit(0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        if number := os.fork():
            started.append(number)
            connection.close()
            continue
        server.close()
        for each in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        os.setpgid(0, 0)
        _answer(connection)


if __name__ == "__main__":
    main()
