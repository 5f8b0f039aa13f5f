"""Rows of all tasks, a checkpoint of random weights, and tools/evaluate.py called in this process."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from hrm_megatron.config import Architecture
from hrm_megatron.evaluate.tasks import TASKS
from tests.tools import load_tool

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"
CONTEXT = 320
HERE = [name for name in TASKS if name != "math" or importlib.util.find_spec("math_verify")]
DATE = dict(day="", month="", year="")


def made_rows(n):
    """Row number `n` of each task."""
    choices = ["one", "two", "three", "four"]
    return dict(
        gsm8k=dict(question=f"What is {n} plus 1?", answer=f"So.\n#### {n + 1}"),
        math=dict(problem=f"Halve {n}.", solution=rf"It is $\boxed{{\frac{{{n}}}{{2}}}}$."),
        drop=dict(passage=f"They scored {n} goals.", question="How many goals?",
                  answer=dict(number=str(n), spans=[], date=DATE),
                  validated_answers=dict(number=["", str(n)], spans=[["goals"], []], date=[DATE, DATE])),
        mmlu=dict(question=f"Which is {n}?", choices=choices, answer=n % 4, subject=f"sums{n % 2}"),
        mmlu_pro=dict(question=f"Which is {n}?", options=choices, answer="ABCD"[n % 4], category=f"field{n % 2}"),
        arc_challenge=dict(question=f"Which is {n}?", choices=dict(text=choices, label=list("ABCD")),
                           answerKey="ABCD"[n % 4]),
        hellaswag=dict(ctx_a=f"He has {n}.", ctx_b="then he", endings=choices, label=str(n % 4)),
        winogrande=dict(sentence=f"{n} is more than _.", option1="one", option2="two", answer=str(1 + n % 2)),
        boolq=dict(question=f"is {n} even", passage="Numbers.", answer=n % 2 == 0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows as jsonl, those of boolq as Parquet in two parts as the hub names them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("data")
    for name, task in TASKS.items():
        (folder / name).mkdir()
        for split in (task.source.split, task.source.shots_split):
            rows = [made_rows(n)[name] for n in range(5)]
            if split and name == "boolq":
                for part in range(2):
                    pq.write_table(pa.Table.from_pylist(rows[3 * part:3 * part + 3]),
                                   folder / name / f"{split}-{part:05}-of-00002.parquet")
            elif split:
                (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def checkpoint(single_rank, tmp_path_factory):
    from hrm_megatron.convert.checkpoint import PARTS, Checkpoint, Training
    from hrm_megatron.convert.to_megatron import write_megatron
    from hrm_megatron.data.tokenizer import TextTokenizer

    generator = torch.Generator().manual_seed(11)
    architecture = Architecture(1, 24, 3, 40, TextTokenizer(TOKENIZER).vocab_size)
    made = Checkpoint(Path("random"), architecture, Training(CONTEXT, 2 * CONTEXT, 9), 7, 5, frozenset(PARTS),
                      lambda part, entry: torch.randn(entry.shape, generator=generator).to(
                          torch.float32 if entry.trained else torch.bfloat16) * 0.7)
    folder = tmp_path_factory.mktemp("evaluated") / "checkpoints"
    write_megatron(made, folder)
    return folder


@pytest.fixture(scope="module")
def module():
    return load_tool("evaluate")


@pytest.fixture
def tool(single_rank, module, checkpoint, data, monkeypatch, capsys):
    """Call the tool's main with these flags and return (status, stdout, the line of an error)."""
    def call(*flags, tasks=HERE, rows=data):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--load", str(checkpoint), "--tokenizer-model",
                                          str(TOKENIZER), "--data", str(rows), "--tasks", *tasks, *map(str, flags)])
        status = module.main()
        captured = capsys.readouterr()
        return status, captured.out, [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return call
