"""The same export in the oldest and in the newest transformers that pyproject.toml lets in, installed on the spot."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from tests.convert.test_export import QUESTIONS, checkpoint, export, of_ours, tokenizer  # noqa: F401  # fixtures
from tests.convert.test_prompts import CHAT, assert_near, our_logits

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
[DECLARED] = [requirement for requirement
              in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
              if requirement.startswith("transformers")]
OLDEST = re.fullmatch(r"transformers>=(\d+\.\d+),<\d+", DECLARED)[1]


@pytest.mark.parametrize("which, requirement", [("oldest", f"transformers=={OLDEST}.0"), ("newest", DECLARED)])
def test_an_export_is_read_as_by_our_model(export, checkpoint, tokenizer, tmp_path, which, requirement):  # noqa: F811
    installed = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path / "site",
                                requirement], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"needs a package index with {requirement}: {installed.stderr.strip().splitlines()[-1]}")
    spelling, answers = tokenizer.spelling, ["four plus", "seven", "", "three"]
    asked = dict(prompts=[f"{spelling.boq}{question}{spelling.eoq}" for question in QUESTIONS],
                 answers=[f"{answer}{spelling.eoa}" for answer in answers], chats=[CHAT, CHAT[:1]], max_new_tokens=6)
    (tmp_path / "question.json").write_text(json.dumps(asked))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, Path(__file__).with_name("asks_export.py"), export, tmp_path / "question.json",
                    tmp_path / "answer"], env=environment, check=True)
    found = torch.load(tmp_path / "answer", weights_only=True)
    assert found["file"].startswith(str(tmp_path))
    print(f"{which} transformers: {found['version']}")
    assert which != "oldest" or found["version"] == f"{OLDEST}.0"

    prompts = [tokenizer.encode_prefix("", question) for question in QUESTIONS]
    chats = [tokenizer.encode_prefix("cot", text) for text in (
        "User: three plus four?\n\nAssistant: three\n\nUser: What is four?", "three plus four?")]
    targets = [tokenizer.encode_response(answer) for answer in answers]
    words, ends = checkpoint.architecture.vocab_size, {tokenizer.eoa, tokenizer.special_ids["<|PAD|>"]}

    def without_ends(rows):
        return [[i for i in row if i not in ends] for row in rows]

    for name, rows in (("prompts", [(prompt, [0]) for prompt in prompts]), ("chats", [(chat, [0]) for chat in chats]),
                       ("pairs", [*zip(prompts, targets, strict=True)])):
        for theirs, ours in zip(found[f"{name} logits"], our_logits(checkpoint, rows), strict=True):
            assert_near(theirs[:len(ours), :words], ours)
        if name != "pairs":
            expected = of_ours(checkpoint, tokenizer, [prefix for prefix, _ in rows], asked["max_new_tokens"])
            assert without_ends(found[f"{name} answers"]) == expected
    texts = [tokenizer.decode(answer) for answer in of_ours(checkpoint, tokenizer, prompts, asked["max_new_tokens"])]
    assert found["trusted"] == found["saved again"] == texts != found["causal"]
