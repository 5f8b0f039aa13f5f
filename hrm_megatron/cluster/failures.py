"""Why a launch failed: one summary of the error files of all ranks, the first failure on top."""
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from hrm_megatron.program import write_aside

ERROR_FILE, SUMMARY_FILE = "error.json", "errors.txt"  # the first is written by torchrun and training/error_file.py
# Errors of a rank that only lost its connection to another one.
LOST_A_PEER = re.compile(r"Connection (?:refused|(?:closed|reset) by (?:remote )?peer)|Software caused connection abort"
                         r"|NCCL (?:communicator was aborted|remote process exited)"
                         r"|Broken pipe|Timed? ?out|ncclRemoteError|DistNetworkError|SignalException|recvValue failed",
                         re.IGNORECASE)
ONE_LINE = "error: "  # prefix of training's one-line errors
FAILED, REFUSED, WENT_BACK = "failed", "refused", "went back"  # outcomes, as in training/error_file.py


@dataclass(frozen=True)
class Failure:
    """The error file of one rank; `written_ns` is the file server's time, one clock for all nodes."""

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
    """Read all error files under `logs`, sorted: ranks that only lost a peer last, else by time."""
    found = []
    for path in logs.rglob(ERROR_FILE):
        node, *inner = path.parent.relative_to(logs).parts
        place = f"node {node}, local rank {inner[-1]}" if inner else f"node {node}"
        found.append(Failure(place, path.stat().st_mtime_ns, *_read(path)))
    return sorted(found, key=lambda failure: (failure.lost_a_peer, failure.written_ns, failure.place))


def first_cause(failures: list[Failure], code: int) -> tuple[str, str]:
    """Return the outcome of a failed launch, and the reason in one line."""
    if not failures:
        return FAILED, f"exit code {code}, no trace"
    first = failures[0]
    return first.outcome, first.last_line if first.outcome == FAILED else first.trace.removeprefix(ONE_LINE).strip()


def summarize(failures: list[Failure], code: int, logs: Path) -> str:
    """Return the summary, with the trace of the first cause on top."""
    if not failures and not any(path.stat().st_size for path in logs.rglob("std*.log")):
        return (f"exit code {code}, and no rank has said anything: the launcher failed, or ranks were killed before "
                "they said anything; see the log of the job\n")
    if not failures:
        return (f"exit code {code}, and no rank left a trace: it was killed (memory, a signal, its node); see the "
                "logs beside this file\n")
    first, *others = failures
    text = f"first failure: {first.place}\n{first.trace.rstrip()}\n"
    if first.lost_a_peer:
        text = ("every trace is of a rank that lost another one, which left none itself: it was killed (memory, a "
                f"signal, its node)\n{text}")
    return text + "".join(f"then {other.place}: {other.last_line}\n" for other in others)


def write_refusal(folder: Path, line: str) -> None:
    """Write an error file to the folder of a node or rank that says why its launcher starts nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    message = dict(message=line, extraInfo=dict(py_callstack=f"{ONE_LINE}{line}", outcome=REFUSED))
    write_aside(folder / ERROR_FILE, json.dumps(dict(message=message)))


def _read(path: Path) -> tuple[str, str]:
    """Return the trace and the outcome in an error file; torch's own files have no outcome."""
    try:
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
        if isinstance(message, str):
            return message, FAILED
        extra = message.get("extraInfo", {})
        return str(extra.get("py_callstack") or message["message"]), str(extra.get("outcome", FAILED))
    except (ValueError, KeyError, AttributeError) as error:
        return f"{path}: damaged ({error})", FAILED
