"""Whole runs by command line on the device that is there."""
import subprocess
import sys

import numpy as np
import pytest

from tests.training.conftest import GOLDEN, scalars

SIZES = ["--num-layers", 4, "--hidden-size", 256, "--num-attention-heads", 4, "--seq-length", 1024,
         "--micro-batch-size", 4, "--global-batch-size", 8]


@pytest.fixture(autouse=True)
def fp32_is_fp32(monkeypatch):
    """In runs of a process of their own too, whatever a container exports."""
    import torch

    monkeypatch.delenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", raising=False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def relative(ours, theirs):
    """Error of a tensor, of its norm."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Examples whose response is the prefix and as many new digits: half of it can be learnt, half of it never."""
    from hrm_megatron.data.indexed_examples import IndexedExamplesWriter
    from hrm_megatron.data.tokenizer import TextTokenizer

    prefix, tokenizer = tmp_path_factory.mktemp("store") / "digits", TextTokenizer(GOLDEN / "tokenizer")
    generator = np.random.default_rng(1)
    with IndexedExamplesWriter(prefix, tokenizer) as writer:
        for _ in range(20_000):
            asked, new = ("".join(map(str, generator.integers(10, size=8))) for _ in range(2))
            writer.add(tokenizer.encode_prefix("direct", asked), tokenizer.encode_response(asked + new))
    return prefix


@pytest.fixture(scope="session")
def run_on_a_gpu(digits, request, tmp_path_factory):
    """Train by the command line in bf16: losses by step. (A process of its own: CUDA survives no fork.)"""
    import torch

    def run(*flags):
        folder = tmp_path_factory.mktemp("log")
        arguments = ["--data-path", digits, "--lr", 1e-3, "--lr-warmup-iters", 8, "--eval-iters", 0, "--log-interval",
                     1, "--num-workers", 0, "--bf16", "--tensorboard-dir", folder, *flags]
        if not torch.cuda.is_available():
            run = request.getfixturevalue("launch")(*arguments)
            assert run.code == 0, run.output[-5000:]
            return scalars(folder)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
                               "-m", "hrm_megatron.pretrain", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-5000:]
        return scalars(folder)
    return run
