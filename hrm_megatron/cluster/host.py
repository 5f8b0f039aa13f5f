"""Facts and limits of a machine for its launcher: node name, open files, NUMA binding."""
from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

from hrm_megatron.config import ConfigError

# For the process of rank 0: torch's store and a gloo group hold a socket per rank.
FILES_PER_RANK, OTHER_FILES = 2, 256
MOST_FILES = 1 << 20  # a limit of a billion slows programs that close every descriptor below it
DEVICES, NUMA_NODES = Path("/dev"), Path("/sys/devices/system/node")
HIDE_ALL = ("", "-1", "NoDevFiles")  # first entries of CUDA_VISIBLE_DEVICES that hide all GPUs


def node_name() -> str:
    """Return Slurm's name of this node, which is used to exclude nodes."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def raise_file_limit(ranks: int) -> str | None:
    """Raise the limit of open files of this process and its children as far as allowed; return an error line if `ranks`
    ranks need more, else None.

    A login shell has 1,024, which Slurm propagates to the nodes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    if files >= (needed := FILES_PER_RANK * ranks + OTHER_FILES):
        return None
    return (f"a process on {node_name()} may open {files} files (ulimit -Hn), and {ranks} ranks need {needed}: raise "
            "that limit (LimitNOFILE of slurmd's unit, or of the container)")


def numa_flags(asked: str | None) -> list[str]:
    """Return torchrun's flags that bind each rank to the cores near its GPU. A binding that was `asked` for raises
    ConfigError where it is not possible. By default ranks are bound if there are GPUs and several NUMA nodes, with a
    line on stderr where it is not possible.

    torchrun itself would end with a traceback.
    """
    first_visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")[0].strip()
    gpus = any(DEVICES.glob("nvidia[0-9]*")) and first_visible not in HIDE_ALL
    cores = [{int(cpu.name[3:]) for cpu in node.glob("cpu[0-9]*")} for node in NUMA_NODES.glob("node[0-9]*")]
    cores = [some for some in cores if some]  # a NUMA node may have memory only
    own = os.sched_getaffinity(0)
    if asked == "none" or (asked is None and not (gpus and len(cores) > 1)):
        return []
    trouble = "there is no GPU" if not gpus else _trouble_of_numactl(min(own))
    if asked:
        if trouble:
            raise ConfigError(f"--numa-binding {asked} on {node_name()}: {trouble}; mend that, or say none (NUMA=none)")
        return ["--numa-binding", asked]
    if trouble is None and not all(some & own for some in cores):
        trouble = "the job has no cores of one of its NUMA nodes"
    if trouble:
        print(f"numa: ranks on {node_name()} are not bound to the cores beside their GPUs: {trouble}", file=sys.stderr)
        return []
    return ["--numa-binding", "node"]


def _trouble_of_numactl(core: int) -> str | None:
    """Return why torchrun could not start a rank with numactl, or None; a container may forbid its system calls."""
    try:
        done = subprocess.run(["numactl", f"--physcpubind={core}", "true"], capture_output=True, text=True)
    except FileNotFoundError:
        return "numactl is not installed"
    return f"numactl: {(done.stderr or done.stdout).strip()}".splitlines()[0] if done.returncode else None
