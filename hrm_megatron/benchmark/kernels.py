"""Break down the time of a step: the kernels of a torch.profiler trace, summed by kind."""
from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

GROUPS = (  # first match with the name of a kernel (GPU) or operator (CPU)
    ("communication", r"nccl|gloo|c10d::|all_?reduce|all_?gather|reduce_?scatter|broadcast_"),
    ("attention", r"flash|fmha|attention|sdpa|cudnn.*mha"),
    ("matmuls", r"gemm|gemv|cutlass|nvjet|xmma|cublas|aten::(add)?(b?mm|bmm)|mkldnn|linear_pointwise"),
    ("optimizer", r"atan2|multi_tensor|adam|lerp"),
    ("copies and casts", r"memcpy|memset|copy_|cast|transpose|fill_|zero_|cat"),
    ("softmax and loss", r"softmax|nll|logsumexp|argmax|exp\b"),
    ("other element-wise", r""),
)


class Share(NamedTuple):
    group: str
    seconds: float
    share: float


def breakdown(trace: Path) -> list[Share]:
    """Return the time of a trace by group, largest first; without GPU kernels, by the self time of CPU operators."""
    with gzip.open(trace) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spent = [(event["name"], event["dur"]) for event in kernels] or _own_times(
        [event for event in events if event.get("cat") == "cpu_op"])
    sums: dict[str, float] = defaultdict(float)
    for name, microseconds in spent:
        sums[next(group for group, names in GROUPS if re.search(names, name, re.IGNORECASE))] += microseconds / 1e6
    total = sum(sums.values())
    return sorted((Share(group, seconds, seconds / total) for group, seconds in sums.items()),
                  key=lambda share: -share.seconds)


def _own_times(operators: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Return (name, self time) of operators: their duration minus that of operators nested in them on the same
    thread."""
    own = [float(event["dur"]) for event in operators]
    for thread in {event["tid"] for event in operators}:
        around: list[int] = []
        mine = [i for i, event in enumerate(operators) if event["tid"] == thread]
        for i in sorted(mine, key=lambda i: (operators[i]["ts"], -operators[i]["dur"])):
            while around and operators[around[-1]]["ts"] + operators[around[-1]]["dur"] <= operators[i]["ts"]:
                around.pop()
            if around:
                own[around[-1]] -= operators[i]["dur"]
            around.append(i)
    return [(event["name"], time) for event, time in zip(operators, own, strict=True)]
