"""Write questions of DeepMind's mathematics_dataset as disjoint train, validation and test rows."""
from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError

Row = dict[str, str]  # condition, instruction, response, module

# The best constant answer is right for a tenth and a quarter of these; a model of a million parameters learns most of
# them in minutes.
MODULES = ("numbers__place_value", "comparison__pair")
CONDITION = "direct"
CHUNK_QUESTIONS = 1000  # per seed, so that the rows do not depend on the number of processes
MIN_NEW_SHARE = 0.02  # of a round; with fewer new questions than this the module is exhausted


def write_questions(folder: str | Path, train_count: int, valid_count: int, test_count: int, seed: int = 0,
                    modules: Sequence[str] = MODULES, processes: int = 2) -> dict[str, list[Row]]:
    """Write train.jsonl, valid.jsonl and test.jsonl into `folder` and return their rows.

    The counts are rows per file, divided evenly among the modules. The same seed gives the same bytes. No question text
    occurs twice. Raises ConfigError for a module that is unknown or has too few different questions. Starts processes:
    the calling program needs `if __name__ == "__main__":`.
    """
    if unknown := set(modules) - set(_generators()):
        raise ConfigError(f"modules={sorted(unknown)}: not in mathematics_dataset; choose from {sorted(_generators())}")
    counts = {"train": train_count, "valid": valid_count, "test": test_count}
    files: dict[str, list[Row]] = {name: [] for name in counts}
    # Workers ignore Ctrl-C: this process ends them.
    with _fixed_hashes(), multiprocessing.get_context("spawn").Pool(
            processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        for place, module in enumerate(modules):
            shares = {name: len(range(place, count, len(modules))) for name, count in counts.items()}
            rows = iter(_distinct_rows(pool, module, sum(shares.values()), seed))
            for name, share in shares.items():
                files[name] += [next(rows) for _ in range(share)]

    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, chosen in files.items():
        random.Random(f"{seed} {name}").shuffle(chosen)
        lines = [json.dumps(row) + "\n" for row in chosen]
        (Path(folder) / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [row["instruction"] for chosen in files.values() for row in chosen]
    assert len(texts) == len(set(texts))
    return files


def constant_answer_accuracy(train: Iterable[Row], test: Iterable[Row]) -> float:
    """Return the share of `test` answered right by the most frequent answer of each module in `train`."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        seen[row["module"]][row["response"]] += 1
    constant = {module: answers.most_common(1)[0][0] for module, answers in seen.items()}
    right = [constant.get(row["module"]) == row["response"] for row in test]
    return sum(right) / len(right)


def _distinct_rows(pool: Pool, module: str, count: int, seed: int) -> list[Row]:
    """Return `count` rows of a module without duplicate questions, shuffled."""
    answers: dict[str, str] = {}
    chunks = 0
    while (missing := count - len(answers)) > 0:
        wanted = -(-missing // CHUNK_QUESTIONS)
        before = len(answers)
        for pairs in pool.starmap(_generate, [(module, seed, chunks + i) for i in range(wanted)], chunksize=1):
            answers |= {question: answer for question, answer in pairs if question not in answers}
        chunks += wanted
        if len(answers) < count and len(answers) - before < MIN_NEW_SHARE * wanted * CHUNK_QUESTIONS:
            raise ConfigError(f"{module}: {count} different questions wanted, there are about {len(answers)}; "
                              "ask for fewer")
    # Rare questions come late, so shuffle before the rows are divided: all files get the same distribution.
    pairs = list(answers.items())
    random.Random(f"{seed} {module}").shuffle(pairs)
    return [{"condition": CONDITION, "instruction": question, "response": answer, "module": module}
            for question, answer in pairs[:count]]


def _generate(module: str, seed: int, chunk: int) -> list[tuple[str, str]]:
    """Return the (question, answer) pairs of one chunk; the arguments are its only source of randomness."""
    import numpy as np

    random.seed(f"{seed} {module} {chunk}")
    np.random.seed(random.getrandbits(32))  # the generators draw from both global states
    make = _generators()[module]
    problems = [make() for _ in range(CHUNK_QUESTIONS)]
    return [(str(problem.question), str(problem.answer)) for problem in problems]


@cache
def _generators() -> dict[str, Callable[[], Any]]:
    """Return the generators by name (area__module), without those of compositions, which fail with numpy 2."""
    import sympy.solvers.diophantine  # noqa: F401

    # mathematics_dataset 1.0.1 expects this function in a place where sympy no longer has it. By name, because the
    # attribute `sympy.solvers.diophantine` is a function that hides the module.
    outer = sys.modules["sympy.solvers.diophantine"]
    outer.base_solution_linear = sys.modules[f"{outer.__name__}.diophantine"].base_solution_linear  # type: ignore
    from mathematics_dataset.modules import modules

    areas = modules.train(_easiest_third)
    return {f"{area}__{name}": make for area, members in areas.items() for name, make in members.items()
            if not name.endswith("_composed")}


def _easiest_third(entropy: tuple[float, float]) -> tuple[float, float]:
    low, high = entropy
    return low, low + (high - low) / 3


@contextmanager
def _fixed_hashes() -> Iterator[None]:
    """Fix the string hashes of processes started in the block: some generators choose from a set of letters."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = before
