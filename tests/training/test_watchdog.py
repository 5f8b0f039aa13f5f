"""A rank that hangs is named, the stacks of the others are there, and the run goes on as if nothing had happened."""
from __future__ import annotations

import re
import shutil

import pytest

from hrm_megatron.checkpoint.folders import find_iteration
from tests.training.test_resume import tensors_that_differ

STEP = 15
HANGS = """
import os, signal, time
from hrm_megatron.training.step import TrainingStep
from hrm_megatron.data.batch import PackedBatch

forward, read, steps = TrainingStep.forward, PackedBatch.from_rows, []

def forwards(self, *arguments):
    steps.append(self.running_step())
    if os.environ["RANK"] == "1" and self.running_step() == {step} and "{how}" == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    return forward(self, *arguments)

def reads(rows):
    if os.environ["RANK"] == "1" and steps and steps[-1] == {step} and "{how}" == "asleep":
        time.sleep(1000)
    return read(rows)
TrainingStep.forward, PackedBatch.from_rows = forwards, reads
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["asleep", "stopped"])
def test_a_rank_that_hangs_is_named(launch, fullbatch_arguments, native_start, uninterrupted, tmp_path, how):
    save = tmp_path / "run"
    shutil.copytree(native_start, save)
    flags = [*fullbatch_arguments, "--load", save, "--save", save, "--save-interval", 12]
    run = launch(*flags, "--hang-timeout-minutes", 0.5, ranks=2, prelude=HANGS.format(step=STEP, how=how))
    assert run.code == 1, run.output
    lines = [line for text in (run.output, run.last_output) for line in text.splitlines() if line.startswith("hang: ")]
    assert len(lines) == 1, lines
    if how == "asleep":
        said = rf"hang: rank 1 on \S+ is silent since step {STEP} in 'reading data'; all others are in '"
        assert re.match(said, lines[0]), lines
    else:  # it last spoke somewhat before it was stopped
        found = re.match(r"hang: rank 1 on \S+ does not answer, last heard of in step (\d+) in '", lines[0])
        assert found and int(found[1]) <= STEP, lines
    stacks = {path.name: path.read_text() for path in (save / "stacks").iterdir()}
    assert set(stacks) == ({"rank-0.txt", "rank-1.txt"} if how == "asleep" else {"rank-0.txt"})
    assert "train_step" in stacks["rank-0.txt"] and (how == "stopped" or "in reads" in stacks["rank-1.txt"])
    again = launch(*flags, "--hang-timeout-minutes", 0.5, ranks=2)
    assert again.code == 0, again.output
    undisturbed = launch(*fullbatch_arguments, "--load", native_start, "--save", tmp_path / "b", "--save-interval", 12,
                         ranks=2)
    assert undisturbed.code == 0, undisturbed.output
    assert not tensors_that_differ(*(find_iteration(tmp_path / name) for name in ("run", "b")))


@pytest.mark.parametrize("flags, said", [
    ((), "--hang-timeout-minutes 2: ranks tell each other where they are by files in --save; give that too"),
    (("--save", "x", "--distributed-timeout-minutes", 3), "--hang-timeout-minutes 2: the collectives end the run after "
     "--distributed-timeout-minutes 3, before a silent rank is named; give more than 3 there, or less here"),
])
def test_times_that_would_do_nothing_are_refused(flags, said):
    from hrm_megatron.config import ConfigError
    from hrm_megatron.training.flags.parser import full_parser
    from hrm_megatron.training.flags.values import check_values

    args = full_parser().parse_args(["--hang-timeout-minutes", "2", *map(str, flags)])
    with pytest.raises(ConfigError) as refused:
        check_values(args, cuda=False)
    assert str(refused.value) == said
