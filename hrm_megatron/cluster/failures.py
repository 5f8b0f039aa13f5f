"""Why a launch failed: the error files of all ranks in one summary, the one that failed first on top."""
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

ERROR_FILE, SUMMARY_FILE = "error.json", "errors.txt"  # the first is torchrun's, and training/error_file.py's
# What a rank says that only lost another one.
LOST_A_PEER = re.compile(r"Connection (?:closed|reset) by peer|NCCL (?:communicator was aborted|remote process exited)"
                         r"|Broken pipe|Timed? ?out|ncclRemoteError|DistNetworkError|SignalException|recvValue failed",
                         re.IGNORECASE)
REFUSED = "error: "  # begins the one line of an input that training refuses


@dataclass(frozen=True)
class Failure:
    """What one rank left: `written_ns` is the file server's time, the same clock for all nodes."""

    place: str
    written_ns: int
    trace: str

    @property
    def last_line(self) -> str:
        return (self.trace.strip().splitlines() or ["no message"])[-1]

    @property
    def lost_a_peer(self) -> bool:
        return bool(LOST_A_PEER.search(self.last_line))


def read_failures(logs: Path) -> list[Failure]:
    """Read all error files under `logs`: the first cause before those that only lost a peer, then by time."""
    found = []
    for path in logs.rglob(ERROR_FILE):
        node, *_, local_rank = path.parent.relative_to(logs).parts
        found.append(Failure(f"node {node}, local rank {local_rank}", path.stat().st_mtime_ns, _trace(path)))
    return sorted(found, key=lambda failure: (failure.lost_a_peer, failure.written_ns, failure.place))


def refusal(failures: list[Failure]) -> str | None:
    """Return the line of a run whose input was refused: to start it again would not help."""
    if failures and failures[0].trace.startswith(REFUSED) and not failures[0].trace.startswith(f"{REFUSED}rank "):
        return failures[0].trace.removeprefix(REFUSED).strip()
    return None


def summarize(failures: list[Failure], code: int) -> str:
    """Write the summary; the trace of the first cause comes first."""
    if not failures:
        return (f"exit code {code}, and no rank left a trace: it was killed (memory, a signal, its node); see the "
                "logs beside this file\n")
    first, *others = failures
    text = f"first failure: {first.place}\n{first.trace.rstrip()}\n"
    if first.lost_a_peer:
        text = ("every trace is of a rank that lost another one, which left none itself: it was killed (memory, a "
                f"signal, its node)\n{text}")
    return text + "".join(f"then {other.place}: {other.last_line}\n" for other in others)


def _trace(path: Path) -> str:
    try:
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
        if isinstance(message, str):
            return message
        return str(message.get("extraInfo", {}).get("py_callstack") or message["message"])
    except (ValueError, KeyError, AttributeError) as error:
        return f"{path}: damaged ({error})"
