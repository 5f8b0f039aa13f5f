"""A rank that hangs is named, the stacks of the others are there, and the run goes on as if nothing had happened."""
from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first and os.environ["RANK"] == "{rank}" and self.running_step() == {step} and "{how}" == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    return forward(self, *arguments)

def reads(rows):
    if os.environ["RANK"] == "{rank}" and steps and steps[-1] == {step} and "{how}" == "asleep":
        time.sleep(1000)
    return read(rows)
TrainingStep.forward, PackedBatch.from_rows = forwards, reads
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["asleep", "stopped"])
def test_a_rank_that_hangs_is_named(launch, fullbatch_arguments, native_start, uninterrupted, tmp_path, how,
                                    survived):
    save = tmp_path / "run"
    shutil.copytree(native_start, save)
    flags = [*fullbatch_arguments, "--load", save, "--save", save, "--save-interval", 12]
    run = launch(*flags, "--hang-timeout-minutes", 0.5, ranks=2, prelude=HANGS.format(step=STEP, how=how, rank=1))
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
    survived(f"a rank hangs, {how}", "DP 2")


@pytest.mark.slow
def test_torchrun_kills_a_rank_0_that_was_stopped_and_starts_again(launch, fullbatch_arguments, native_start, tmp_path,
                                                                  survived):
    flags = [*fullbatch_arguments, "--load", native_start, "--save-interval", 12]
    undisturbed = launch(*flags, "--save", tmp_path / "b", ranks=2)
    assert undisturbed.code == 0, undisturbed.output
    save, script = tmp_path / "run", tmp_path / "stopped.py"
    shutil.copytree(native_start, save)
    script.write_text("from hrm_megatron import pretrain\n" + HANGS.format(step=STEP, how="stopped", rank=0)
                      + "pretrain.main()\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         str(script), *map(str, flags), "--load", save, "--save", save, "--hang-timeout-minutes", "0.5"],
        capture_output=True, text=True, env=os.environ | dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
                                                              PYTHONPATH=str(Path(__file__).parents[2])))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    assert len(re.findall(r"^hang: rank 0 on \S+ does not answer, last heard of in step ", said, re.MULTILINE)) == 1
    assert re.findall(r"^schedule: steps (\d+) to", said, re.MULTILINE) == ["1", "13"]
    assert not tensors_that_differ(*(find_iteration(tmp_path / name) for name in ("run", "b")))
    survived("rank 0 is stopped (SIGSTOP), torchrun starts again", "DP 2")


def test_a_rank_ends_for_a_hang_where_it_cannot_write(tmp_path, monkeypatch, caplog, capfd):
    """One that gets on needs no storage until it saves."""
    from hrm_megatron.training import watchdog

    dog, beats = watchdog.Watchdog(tmp_path, 0.5, running_step=lambda: 7), []
    dog.rank, dog.folder = 3, tmp_path

    def full(folder, beat):
        beats.append(beat)
        if len(beats) < 40:
            dog.mark("reading data")
        elif len(beats) == 400:
            dog.ended.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(watchdog, "write_beat", full)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(watchdog.os, "_exit", sys.exit)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as ended:
        dog.look()
    assert ended.value.code == watchdog.EXIT_CODE and len(beats) > 40
    said, once = capfd.readouterr().err, [record for record in caplog.records if "cannot write to" in record.message]
    assert len(once) == 1 and "in look" in said
    line = r"hang: rank 3 on \S+ is in 'reading data' of step 7 for \d s, and cannot ask the others"
    assert re.search(f"^{line}", said, re.MULTILINE)
    assert "and cannot ask the others" in (tmp_path / "error.json").read_text()


@pytest.fixture
def dogs(tmp_path, monkeypatch):
    """Make watchdogs that have written a beat each; one that sounds raises SystemExit."""
    from hrm_megatron.training import watchdog

    monkeypatch.setattr(watchdog.os, "_exit", sys.exit)
    for name in ("dump_traceback_later", "dump_traceback"):
        monkeypatch.setattr(watchdog.faulthandler, name, lambda *_, **__: None)

    def make(ranks):
        found = [watchdog.Watchdog(tmp_path, 1.0, running_step=lambda: 7) for _ in range(ranks)]
        for rank, dog in enumerate(found):
            dog.rank, dog.ranks, dog.folder = rank, ranks, tmp_path
            dog.beat()
        return found
    return make


def test_one_rank_reads_what_all_said_whatever_their_number(dogs, tmp_path, monkeypatch, capsys):
    from hrm_megatron.training import watchdog

    ranks, reads, stock = 16, [], Path.read_text

    def read_text(path, *arguments, **options):
        reads.append(path)
        return stock(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(watchdog.time, "sleep", lambda _: None)
    for dog in dogs(ranks):
        with pytest.raises(SystemExit):
            dog.sound()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hang: ")]
    assert len(said) == 1 and said[0].startswith("hang: rank 1 on ") and "does not answer" in said[0]
    assert sum(path.name.startswith("rank-") and path.parent == tmp_path for path in reads) <= 4 * ranks


def test_a_judge_that_cannot_read_leaves_the_verdict_to_another(dogs, tmp_path, monkeypatch, capsys):
    from hrm_megatron.training import watchdog

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    failing, waiting = dogs(2)
    role = watchdog.JUDGES[0]
    assert failing.is_first(role)

    def gives_up(_):
        """While the other rank waits."""
        if not (tmp_path / "gave-up").exists():
            (tmp_path / "gave-up").touch()
            with monkeypatch.context() as broken, pytest.raises(OSError, match="Input/output"):
                broken.setattr(watchdog, "read_beats", fails)
                failing.judge(role)

    monkeypatch.setattr(watchdog.time, "sleep", gives_up)
    with pytest.raises(SystemExit):
        waiting.sound()
    assert (tmp_path / watchdog.VERDICT).read_text().startswith("hang: rank 0 on ")
    assert capsys.readouterr().err.count("hang: ") == 1


@pytest.mark.parametrize("how, said", [("asleep", "is silent since step 7 in 'reading data'; all others are in '"),
                                       ("stopped", "does not answer, last heard of in step 7 in 'reading data'")])
def test_a_judge_that_dies_is_replaced(dogs, tmp_path, monkeypatch, capsys, how, said):
    """And is not named itself: it answered the alarm."""
    from hrm_megatron.training import watchdog

    judge, silent, *waiting = dogs(4)
    for dog in (judge, silent, *waiting):
        dog.mark("reading data" if dog is silent else "reduction of gradients")
        dog.beat()
    assert judge.is_first(watchdog.JUDGES[0])  # and is never heard of again
    running = [*waiting, silent] if how == "asleep" else waiting
    monkeypatch.setattr(watchdog.time, "sleep", lambda _: [dog.beat() for dog in running])
    for dog in waiting:
        with pytest.raises(SystemExit):
            dog.sound()
    verdicts = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hang: ")]
    assert len(verdicts) == 1 and re.match(rf"hang: rank 1 on \S+ {said}", verdicts[0]), verdicts
    assert "rank 0" not in verdicts[0] and (tmp_path / watchdog.VERDICT).read_text() == verdicts[0]


@pytest.mark.parametrize("flags, said", [
    ((), "--hang-timeout-minutes 2: ranks tell each other where they are by files in --save; give that too"),
    (("--save", "x", "--distributed-timeout-minutes", 3), "--hang-timeout-minutes 2: the collectives end the run after "
     "--distributed-timeout-minutes 3, before a silent rank is named; give more than 3 there, or less here"),
])
def test_times_that_would_do_nothing_are_refused(flags, said):
    from hrm_megatron.config import ConfigError
    from hrm_megatron.training.flags.values import check_values
    from hrm_megatron.training.own_flags import full_parser

    args = full_parser().parse_args(["--hang-timeout-minutes", "2", *map(str, flags)])
    with pytest.raises(ConfigError) as refused:
        check_values(args, cuda=False)
    assert str(refused.value) == said
