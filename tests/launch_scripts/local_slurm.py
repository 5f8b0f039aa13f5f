"""A Slurm of this machine alone: munged, slurmctld and three slurmd that are nodes n1, n2 and n3, all in one folder."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.ports import free_port

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# cons_tres without cgroups; a node that stays silent is down after seconds, not minutes.
CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={port}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=15
SchedulerParameters=sched_interval=2,bf_interval=2
{nodes}
PartitionName=debug Nodes={names} Default=YES MaxTime=600 State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000 State=UNKNOWN"


class LocalSlurm:
    def __init__(self, folder: Path) -> None:
        self.folder, host = folder, socket.gethostname().split(".")[0]
        for name in ("munge", "state", *NODES):
            (folder / name).mkdir(mode=0o755)
        folder.chmod(0o755)
        ports = [free_port() for _ in range(1 + len(NODES))]
        own, *others = ports
        nodes = "\n".join(NODE.format(name=name, host=host, port=port, cpus=os.cpu_count())
                          for name, port in zip(NODES, others, strict=True))
        (folder / "slurm.conf").write_text(CONFIGURATION.format(
            host=host, folder=folder, port=own, nodes=nodes, names=",".join(NODES)))
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        munge = self.folder / "munge"
        self("munged", "--force", *(f"--{what}={munge / what.split('-')[0]}" for what in (
            "key-file", "socket", "pid-file", "log-file", "seed-file")))
        self("slurmctld", "-c")
        for node in NODES:
            self("slurmd", "-N", node)
        self.until_idle()

    def stop(self) -> None:
        self("scancel", "--user", "root", "--signal", "KILL", "--full")
        for name in (*NODES, "slurmctld", "munge/pid"):
            path = self.folder / (name if "/" in name else f"{name}.pid")
            if path.exists():
                with_children(int(path.read_text()))

    def __call__(self, *command: object, **variables: str) -> str:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120,
                              env={**self.environment, **variables})
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def kill_node(self, node: str) -> None:
        """Let a node die: its daemon and all that runs there, without a word."""
        with_children(int((self.folder / f"{node}.pid").read_text()))
        for process in psutil.process_iter(["name", "cmdline"]):
            if process.info["name"] == "slurmstepd" and self.of_node(process, node):
                with_children(process.pid)
        self("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")  # what a timeout would find out

    def of_node(self, process: psutil.Process, node: str) -> bool:
        try:
            return any(child.environ().get("SLURMD_NODENAME") == node
                       and child.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                       for child in process.children(recursive=True))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def job(self, job: str) -> dict[str, str]:
        """Facts of a job, as scontrol names them."""
        return dict(word.split("=", 1) for word in self("scontrol", "-o", "show", "job", job).split() if "=" in word)

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for something that will be so; the test's own time limit ends it otherwise."""
        while not true():
            time.sleep(0.2)

    def until_idle(self) -> None:
        self.until(lambda: self("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * len(NODES))

    def over(self, job: str) -> dict[str, str]:
        """Wait until a job is over and return its facts; one that waits in the queue starts at once.

        Slurm lets a requeued job wait for two minutes.
        """
        while (facts := self.job(job))["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            if facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime":
                self("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=300")
            time.sleep(0.5)
        return facts


def with_children(pid: int) -> None:
    """Kill a process and all below it."""
    try:
        process = psutil.Process(pid)
        below = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for one in (process, *below):
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
