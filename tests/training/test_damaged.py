"""A run whose checkpoint is damaged refuses it, or goes on from the newest one that is not, if it was told to."""
import shutil
from types import SimpleNamespace

import pytest

from hrm_megatron.checkpoint.folders import TRACKER_FILE, find_iteration
from hrm_megatron.checkpoint.manifest import MANIFEST_FILE
from hrm_megatron.checkpoint.verify import verify
from hrm_megatron.config import ConfigError
from hrm_megatron.training.checkpoint import starting_point
from hrm_megatron.training.going_back import correct_tracker
from tests.damage import flip_bit_of_tensor
from tests.training.conftest import scalars, written


@pytest.fixture
def damaged(uninterrupted, tmp_path):
    """The checkpoints of 12 and 24 steps; of the latter one bit of one tensor is another."""
    folder = shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    flip_bit_of_tensor(folder / "iter_0000024" / "__0_0.distcp")
    return folder


@pytest.fixture
def flags(fullbatch_arguments, damaged):
    return [*fullbatch_arguments, "--train-iters", 26, "--lr-decay-iters", 26, "--override-opt-param-scheduler",
            "--load", damaged, "--save", damaged, "--save-interval", 100]


def test_damage_is_refused_and_the_newest_that_verifies_is_named(launch, flags, damaged):
    before = written(damaged)
    run = launch(*flags, ranks=2)
    assert run.code == 2 and "Traceback" not in run.output and len(run.errors) == 1, run.output[-5000:]
    assert f"{damaged}/iter_0000024/__0_0.distcp: " in run.errors[0]
    assert "do not have the CRC32 that was written with them" in run.errors[0]
    assert run.errors[0].endswith("the newest that verifies: --ckpt-step 12, which --load-newest-valid takes by itself")
    assert written(damaged) == before


@pytest.mark.survives("a damaged checkpoint", "1 process")
def test_the_newest_that_verifies_is_taken_where_that_is_wanted(launch, fullbatch_arguments, damaged, uninterrupted,
                                                                tmp_path):
    (damaged / "iter_0000012" / MANIFEST_FILE).unlink()  # as older versions saved
    run = launch(*fullbatch_arguments, "--train-iters", 26, "--use-checkpoint-opt-param-scheduler", "--load", damaged,
                 "--load-newest-valid", "--exit-interval", 14, "--tensorboard-dir", tmp_path / "log")
    assert run.code == 0, run.output[-5000:]
    assert "going on from iter_0000012, the newest that verifies" in run.output
    assert "it has no manifest.json: its tensors were held against their CRC32s" in run.output
    whole = scalars(uninterrupted / "log")
    assert scalars(tmp_path / "log") == {step: whole[step] for step in (13, 14)}
    assert (damaged / TRACKER_FILE).read_text() == "24"  # a later start with the same command does the same


def test_a_damaged_iteration_is_no_end_of_a_run(launch, fullbatch_arguments, damaged, tmp_path):
    flags = [*fullbatch_arguments, "--load", damaged]  # asks for the 24 steps that are done
    run = launch(*flags)
    assert run.code == 2 and len(run.errors) == 1 and "--ckpt-step 12" in run.errors[0], run.output[-5000:]
    run = launch(*flags, "--load-newest-valid", "--exit-interval", 14, "--tensorboard-dir", tmp_path / "log", ranks=2)
    assert run.code == 0 and "going on from iter_0000012, the newest that verifies" in run.output, run.output[-5000:]
    assert list(scalars(tmp_path / "log")) == [13, 14]


def test_who_must_can_skip_it_and_is_told(launch, flags, damaged):
    run = launch(*flags, "--no-verify-checkpoint", "--train-iters", 25)
    assert run.code == 0 and "step 25/25  loss " in run.last_output, run.output[-5000:]
    assert f"checkpoint: {damaged}/iter_0000024 was not verified (--no-verify-checkpoint)" in run.output
    assert "verified: " not in run.output
    assert find_iteration(damaged).name == "iter_0000025" and verify(damaged / "iter_0000025")


@pytest.mark.parametrize("bit", range(16))
def test_no_damage_of_the_tracker_file_is_silent(uninterrupted, tmp_path, caplog, bit):
    folder = shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    tracker = folder / TRACKER_FILE
    text = bytearray(tracker.read_bytes())
    text[bit // 8] ^= 1 << bit % 8
    args = SimpleNamespace(load=str(folder), save=str(folder), pretrained_checkpoint=None, ckpt_step=None,
                           load_newest_valid=False, finetune=False, skip_train=False, rank=0)
    caplog.set_level("INFO", "hrm_megatron")
    for content in (bytes(text), b"12", b""):
        tracker.write_bytes(content)
        caplog.clear()
        try:
            start = starting_point(args)
            assert start.name == "iter_0000024" and tracker.read_bytes() == content
        except ConfigError as error:
            assert content == b"12" and "names iter_0000012, but iter_0000024 was saved after it" in str(error)
        else:
            assert content != b"12" and "going on from iter_0000024" in caplog.text
            correct_tracker(args, start)
            assert tracker.read_text() == "24"
    args.load_newest_valid = True
    tracker.write_bytes(b"12")
    assert starting_point(args).name == "iter_0000024"
    for others in (dict(save=str(tmp_path / "new")), dict(save=None), dict(rank=1), dict(skip_train=True),
                   dict(ckpt_step=24, finetune=True)):
        correct_tracker(SimpleNamespace(**vars(args) | others), start)
        assert tracker.read_text() == "12"
    correct_tracker(args, start)
    assert tracker.read_text() == "24"


@pytest.mark.parametrize("content", [b"x", b"\xb4", None])
def test_a_run_that_saves_elsewhere_loads_past_a_damaged_tracker_file_and_leaves_it(
        launch, fullbatch_arguments, uninterrupted, tmp_path, content):
    folder = shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(folder / "iter_0000024")
    tracker = folder / TRACKER_FILE
    tracker.unlink() if content is None else tracker.write_bytes(content)
    before = written(folder)
    for more in ([], ["--ckpt-step", 12]):
        run = launch(*fullbatch_arguments, "--load", folder, "--save", tmp_path / f"new{len(more)}",
                     "--exit-interval", 13, "--tensorboard-dir", tmp_path / f"log{len(more)}", *more)
        assert run.code == 0 and written(folder) == before, run.output[-5000:]
        assert ("going on from iter_0000012" in run.output) == (not more)
        assert scalars(tmp_path / f"log{len(more)}") == {13: scalars(uninterrupted / "log")[13]}


def test_a_damaged_tracker_file_is_put_right_where_the_run_saves(launch, fullbatch_arguments, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    (folder / TRACKER_FILE).write_bytes(b"\xb4")
    run = launch(*fullbatch_arguments, "--load", folder, "--save", folder)  # asks for the 24 steps that are done
    assert run.code == 0 and "going on from iter_0000024" in run.output, run.output[-5000:]
    assert find_iteration(folder).name == "iter_0000024"
