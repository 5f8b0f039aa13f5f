"""Why a launch failed: the error files of all ranks in one summary, the one that failed first on top."""
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

ERROR_FILE, SUMMARY_FILE = "error.json", "errors.txt"  # the first is torchrun's, and training/error_file.py's
# What a rank says that only lost another one.
LOST_A_PEER = re.compile(r"Connection (?:refused|(?:closed|reset) by (?:remote )?peer)|Software caused connection abort"
                         r"|NCCL (?:communicator was aborted|remote process exited)"
                         r"|Broken pipe|Timed? ?out|ncclRemoteError|DistNetworkError|SignalException|recvValue failed",
                         re.IGNORECASE)
ONE_LINE = "error: "  # how training begins what one line says
FAILED, REFUSED, WENT_BACK = "failed", "refused", "went back"  # how a launch may end, as training/error_file.py says


@dataclass(frozen=True)
class Failure:
    """What one rank left: `written_ns` is the file server's time, the same clock for all nodes."""

    place: str
    written_ns: int
    trace: str
    outcome: str = FAILED

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
        found.append(Failure(f"node {node}, local rank {local_rank}", path.stat().st_mtime_ns, *_read(path)))
    return sorted(found, key=lambda failure: (failure.lost_a_peer, failure.written_ns, failure.place))


def first_cause(failures: list[Failure], code: int) -> tuple[str, str]:
    """Return the outcome of a launch that failed, and why in one line."""
    if not failures:
        return FAILED, f"exit code {code}, no trace"
    first = failures[0]
    return first.outcome, first.last_line if first.outcome == FAILED else first.trace.removeprefix(ONE_LINE).strip()


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


def _read(path: Path) -> tuple[str, str]:
    """Return the trace in an error file, and the outcome; torch's own say none."""
    try:
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
        if isinstance(message, str):
            return message, FAILED
        extra = message.get("extraInfo", {})
        return str(extra.get("py_callstack") or message["message"]), str(extra.get("outcome", FAILED))
    except (ValueError, KeyError, AttributeError) as error:
        return f"{path}: damaged ({error})", FAILED
