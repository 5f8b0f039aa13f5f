"""A file for llama.cpp in llama.cpp itself, built from the source package of its Python bindings.

HRM_LLAMA_CPP names an interpreter that has llama_cpp already; else one is built into .venv/llama-cpp, once.
"""
from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hrm_megatron.convert.gguf_file import write_gguf
from hrm_megatron.convert.gguf_names import LLAMA_CPP
from tests.convert.test_export import QUESTIONS, of_ours
from tests.convert.test_gguf import DTYPES, checkpoint, tokenizer  # noqa: F401  # fixtures
from tests.convert.test_prompts import CHAT, our_logits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]  # most of it the compiler's
ROOT = Path(__file__).parents[2]
REQUIREMENT = "llama_cpp_python==" + re.search(r"llama_cpp_python (\S+)$", LLAMA_CPP)[1]
TOKENS = 7
TEXTS = ["What is three plus four?", "It's 2024,  and\n\n  seven's 1234 \t<|im_end|> !!", "\u00e9 \u4f60\u597d"]


@pytest.fixture(scope="module")
def llama_cpp():
    """An interpreter with llama_cpp."""
    if named := os.environ.get("HRM_LLAMA_CPP"):
        return named
    folder = ROOT / ".venv" / "llama-cpp"
    python, stamp = folder / "bin" / "python", folder / REQUIREMENT
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of pytest-xdist builds it
        if not stamp.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            built = subprocess.run(
                [python, "-m", "pip", "install", "--no-binary", "llama-cpp-python", REQUIREMENT], capture_output=True,
                text=True, env={**os.environ, "CMAKE_ARGS": "-DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF"})
            if built.returncode:
                pytest.skip(f"needs a package index with the source of {REQUIREMENT}, CMake and a C++ compiler: "
                            f"{built.stderr.strip().splitlines()[-1]}")
            stamp.touch()
    return python


@pytest.fixture(scope="module")
def rows(tokenizer):  # noqa: F811
    return [(tokenizer.encode_prefix("cot", question), tokenizer.encode_response(answer))
            for question, answer in zip(QUESTIONS, ("four plus", "seven", "three", ""), strict=True)]


@pytest.fixture(scope="module")
def found(llama_cpp, checkpoint, tokenizer, rows, tmp_path_factory):  # noqa: F811
    """What llama.cpp answers to all that is asked here."""
    place = tmp_path_factory.mktemp("gguf")
    for dtype in DTYPES:
        write_gguf(checkpoint, place / dtype, dtype=dtype, tokenizer=tokenizer.path)
    write_gguf(checkpoint, place / "bare")
    write_gguf(checkpoint, place / "flat", keys="flat", tokenizer=tokenizer.path)
    spelling = tokenizer.spelling
    asked = dict(folders={dtype: str(place / dtype) for dtype in DTYPES}, rows=rows, max_new_tokens=TOKENS,
                 prompts=[f"{spelling.boq}{spelling.tags['cot']}{question}{spelling.eoq}" for question in QUESTIONS],
                 texts=TEXTS, chats=[CHAT, CHAT[:1]], flat=str(place / "flat"))
    asked["without tokenizer"] = str(place / "bare")
    (place / "question").write_text(json.dumps(asked))
    subprocess.run([llama_cpp, Path(__file__).with_name("asks_llama_cpp.py"), place / "question", place / "answer"],
                   check=True)
    return json.loads((place / "answer").read_text())


def distances(theirs, ours):
    """How far logits are apart, as shares of their norm."""
    return [float((torch.tensor(found)[:, :expected.shape[1]] - expected).norm() / expected.norm())
            for found, expected in zip(theirs, ours, strict=True)]


def test_logits_are_ours_if_the_prompt_is_decoded_both_ways(found, checkpoint, rows):  # noqa: F811
    ours = our_logits(checkpoint, rows)
    far = {dtype: max(distances(found[dtype]["whole"], ours)) for dtype in DTYPES}
    print(f"llama_cpp_python {found['version']}, of the norm of the logits: {far}")
    assert far["float32"] < 1e-5
    # bf16 rounds weights and states to 2^-9, Q8_0 to 1/254 of the largest of 32, in each of 36 layers.
    assert 1e-5 < far["bfloat16"] < 36 * 2.0 ** -8 and 1e-5 < far["q8_0"] < 36 / 254


def test_a_release_is_causal_until_a_key_is_overridden(found, checkpoint, rows):  # noqa: F811
    ours = our_logits(checkpoint, rows)
    assert min(distances(found["float32"]["causal"], ours)) > 0.05
    assert max(distances(found["float32"]["overridden"], ours)) < 1e-5


def test_the_cards_lines_answer_as_our_model(found, checkpoint, tokenizer):  # noqa: F811
    prompts = [tokenizer.encode_prefix("direct", "What is 2 + 3?"), [0]]
    spelled, bare = of_ours(checkpoint, tokenizer, prompts, TOKENS)
    assert found["card"] == tokenizer.decode(spelled) + "\n"
    assert found["card without tokenizer"] == f"{bare}\n"


def test_texts_become_the_same_tokens(found, tokenizer, rows):  # noqa: F811
    assert found["prompts"] == [prompt for prompt, _ in rows]
    assert found["texts"] == [tokenizer.encode_response(text)[:-1] for text in TEXTS]
    assert found["ends"] == [tokenizer.boq, tokenizer.eoa]
    spelling = tokenizer.spelling
    assert found["chats"] == [f"{spelling.boq}{text}{spelling.eoq}" for text in (
        "User: three plus four?\n\nAssistant: three\n\nUser: What is four?", "three plus four?")]


def test_keys_from_before_the_merge_are_not_read_by_a_release(found):
    assert "Failed to load model" in found["flat"]
