import json
from pathlib import Path

import pytest

from hrm_megatron.data.tokenizer import TextTokenizer, save_tokenizer, train_tokenizer
from tests.tools import load_tool

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def golden():
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    save_tokenizer(train_tokenizer(["What is three plus four?", "three plus four is seven"] * 3, 300), folder)
    return TextTokenizer(folder)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name, rows):
        """Write rows (dicts as JSON, strings and bytes as they are), one per line."""
        lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
                 for row in rows]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path
    return write


@pytest.fixture(scope="session")
def tool():
    def load(name):
        """Return `main` of a file in tools/."""
        return load_tool(name).main
    return load
