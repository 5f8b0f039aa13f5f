"""A run that stopped, or was killed while it saved, goes on as if nothing had happened."""
import math
import re
import shutil
import textwrap

import pytest
import torch

from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.checkpoint.folders import TRACKER_FILE, complete_iterations, find_iteration
from hrm_megatron.checkpoint.manifest import MANIFEST_FILE, read_manifest
from hrm_megatron.checkpoint.verify import verify
from tests.training.conftest import scalars


def tensors_that_differ(one, other):
    a, b = DCPFolder(one), DCPFolder(other)
    assert a.shapes() == b.shapes()
    return [key for key in a.shapes() if not torch.equal(a.tensor(key), b.tensor(key))]


@pytest.fixture
def stopped(uninterrupted, tmp_path):
    """The folder of a run that has saved at step 12 and no more."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted / "checkpoints" / "iter_0000012", folder / "iter_0000012")
    (folder / TRACKER_FILE).write_text("12")
    return folder


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(launch, fullbatch_arguments, uninterrupted, stopped, tmp_path):
    run = launch(*fullbatch_arguments, "--load", stopped, "--save", stopped, "--save-interval", 12,
                 "--tensorboard-dir", tmp_path / "log")
    assert run.code == 0, run.output
    whole, rest = scalars(uninterrupted / "log"), scalars(tmp_path / "log")
    assert rest == {step: whole[step] for step in range(13, 25)}
    rates = [scalars(folder / "log", "learning-rate") for folder in (uninterrupted, tmp_path)]
    assert rates[1].items() <= rates[0].items()
    ends = [find_iteration(folder) for folder in (stopped, uninterrupted / "checkpoints")]
    assert len(DCPFolder(ends[0]).shapes()) == 18 * 5 + 1  # weights, masters, m, v, EMA; and zL_init
    assert not tensors_that_differ(*ends)
    assert tensors_that_differ(ends[0], stopped / "iter_0000012")  # it has trained


@pytest.mark.parametrize("ranks, layout", [(1, []), (2, ["--pipeline-model-parallel-size", 2])])
def test_what_is_not_saved_any_more_is_still_loaded(launch, fullbatch_arguments, uninterrupted, stopped, tmp_path,
                                                    ranks, layout):
    run = launch(*fullbatch_arguments, "--load", stopped, "--save", stopped, "--no-save-optim", "--no-save-rng",
                 "--exit-interval", 15, "--tensorboard-dir", tmp_path / "log", *layout, ranks=ranks)
    assert run.code == 0, run.output[-3000:]
    whole, rest = scalars(uninterrupted / "log"), scalars(tmp_path / "log")
    assert rest == pytest.approx({step: whole[step] for step in (13, 14, 15)}, abs=0 if ranks == 1 else 1e-5)
    saved = DCPFolder(stopped / "iter_0000015").shapes()
    assert saved and not [key for key in saved if key.startswith("optimizer.")]


COUNTS_STATE = """
import sys
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper as Loader
from hrm_megatron.optim.sharded import EMADistributedOptimizer as Optimizer
state, load = Optimizer.sharded_param_state_fully_reshardable, Loader.load

def counted(self, weights, is_loading=False, metadata=None):
    found = state(self, weights, is_loading, metadata)
    sizes = [len(parts) * parts["param"].data.numel() for parts in found.values()]
    print("STATE", is_loading, *sizes, file=sys.__stdout__, flush=True)
    return found

def told(self, *arguments):
    print("LOADED TOGETHER", file=sys.__stdout__, flush=True)
    return load(self, *arguments)
Optimizer.sharded_param_state_fully_reshardable, Loader.load = counted, told
"""


def test_two_ranks_save_and_load_the_state_of_each_weight_once(launch, fullbatch_arguments, uninterrupted, stopped):
    run = launch(*fullbatch_arguments, "--load", stopped, "--save", stopped, ranks=2, prelude=COUNTS_STATE)
    assert run.code == 0, run.output
    shapes = DCPFolder(find_iteration(uninterrupted / "checkpoints")).shapes()
    sizes = [math.prod(shape) for name, shape in shapes.items() if name.startswith("optimizer.state.")]
    for is_loading in (True, False):
        counts = [sum(map(int, re.search(rf"STATE {is_loading}(.*)", output)[1].split()))
                  for output in (run.output, run.last_output)]
        assert sum(counts) == sum(sizes) and abs(counts[0] - counts[1]) <= 8 * max(sizes)
    assert all("LOADED TOGETHER" in output for output in (run.output, run.last_output))


IN_BACKGROUND = ["--async-save", "--use-persistent-ckpt-worker"]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_save_in_the_background_is_the_same_save(launch, fullbatch_arguments, native_start, uninterrupted, tmp_path,
                                                   ranks):
    run = launch(*fullbatch_arguments, "--load", native_start, "--save", tmp_path, "--save-interval", 6, *IN_BACKGROUND,
                 "--exit-interval", 12, ranks=ranks)
    assert run.code == 0, run.output[-3000:]
    assert re.search(r"step 12/24  is being saved in the background, training waited \d+\.\d s: ", run.last_output)
    whole = re.findall(r"checkpoint: \S+/iter_00000(06|12): whole \d+\.\d s after it was handed over", run.output)
    assert whole == ["06", "12"], run.output
    stalls = scalars(uninterrupted / "log", "seconds of save")
    assert set(stalls) == {12, 24} and min(stalls.values()) > 0
    assert complete_iterations(tmp_path) == ["iter_0000006", "iter_0000012"]
    assert (tmp_path / TRACKER_FILE).read_text() == "12"
    manifests = [read_manifest(tmp_path / name) for name in complete_iterations(tmp_path)]
    assert [(manifest.iteration, manifest.save) for manifest in manifests] == [(6, 1), (12, 2)]
    assert set(manifests[1].files) == {".metadata", "metadata.json",
                                       *(path.name for path in manifests[1].folder.glob("*.distcp"))}
    assert verify(manifests[1].folder) == sum(path.stat().st_size for path in manifests[1].folder.glob("*.distcp"))
    if ranks == 1:
        assert not tensors_that_differ(tmp_path / "iter_0000012", uninterrupted / "checkpoints" / "iter_0000012")
    again = launch(*fullbatch_arguments, "--load", tmp_path, "--exit-interval", 14, "--tensorboard-dir",
                   tmp_path / "log")
    assert again.code == 0, again.output[-3000:]
    whole, rest = scalars(uninterrupted / "log"), scalars(tmp_path / "log")
    assert rest == pytest.approx({step: whole[step] for step in (13, 14)}, abs=0 if ranks == 1 else 1e-5)


@pytest.mark.parametrize("flags", [[], ["--most-recent-k", 1]])
def test_saves_in_the_background_leave_what_others_leave(launch, fullbatch_arguments, tmp_path, flags):
    run = launch(*fullbatch_arguments, "--save", tmp_path, "--save-interval", 1, *IN_BACKGROUND,
                 "--save-retain-interval", 2, *flags, "--exit-interval", 3)
    assert run.code == 0, run.output[-3000:]
    assert complete_iterations(tmp_path) == ["iter_0000002", "iter_0000003"]


def test_a_start_completes_the_save_that_it_goes_on_from(launch, fullbatch_arguments, tmp_path):
    """One without a manifest would be deleted by nobody."""
    arguments = [*fullbatch_arguments, "--save", tmp_path, "--load", tmp_path, "--save-interval", 1]
    assert launch(*arguments, "--exit-interval", 2).code == 0
    (tmp_path / "iter_0000002" / MANIFEST_FILE).unlink()
    run = launch(*arguments, "--most-recent-k", 1, "--exit-interval", 3)
    assert run.code == 0 and "it has no manifest.json" in run.output
    assert complete_iterations(tmp_path) == ["iter_0000003"]


# Where the process dies, as Python that arms it.
MOMENTS = {
    "between two tensors": """
        import functools
        from megatron.core.dist_checkpointing.strategies import filesystem_async as place
        written, stock, me = [], place._write_item, os.getpid()
        @functools.wraps(stock)
        def write(*arguments, **options):
            written.append(1)
            if len(written) > 20:
                os.kill(me, signal.SIGKILL)
                os._exit(1)
            return stock(*arguments, **options)
        place._write_item = write""",
    "after the data": """
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as place
        place.finish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)""",
    "in its last file": """
        from megatron.core.dist_checkpointing import serialization as place
        def save_config(config, folder):
            open(os.path.join(folder, "metadata.json"), "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        place.save_config = save_config""",
    "in the tracker": """
        from megatron.training import checkpointing as place
        stock = place.get_checkpoint_tracker_filename
        def tracker(folder):
            found = stock(folder)
            if os.path.exists(os.path.join(folder, "iter_0000013", "metadata.json")):
                open(found, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return found
        place.get_checkpoint_tracker_filename = tracker""",
    "in its manifest": """
        from hrm_megatron.training import verification as place
        place.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)""",
}


@pytest.mark.survives("kill -9 of a rank in a save", "1 process")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_during_a_save_costs_no_more_than_that_save(launch, fullbatch_arguments, uninterrupted, stopped, moment,
                                                           tmp_path):
    flags = [*fullbatch_arguments, "--load", stopped, "--save", stopped, "--save-interval", 13, "--exit-interval", 13]
    killed = launch(*flags, prelude="import os, signal\n" + textwrap.dedent(MOMENTS[moment]))
    assert killed.code == -9, killed.output
    assert (stopped / "iter_0000013").is_dir()
    whole = moment in ("in the tracker", "in its manifest")
    assert complete_iterations(stopped) == ["iter_0000012"] + ["iter_0000013"] * whole

    again = launch(*flags, "--tensorboard-dir", tmp_path / "log")
    assert again.code == 0, again.output
    first = 14 if whole else 13
    assert ("going on from iter_0000013, the latest that is complete" in again.output) == (moment == "in the tracker")
    assert ("it has no manifest.json: " in again.output) == whole
    assert scalars(tmp_path / "log")[first] == scalars(uninterrupted / "log")[first]
    assert find_iteration(stopped).name == ("iter_0000024" if whole else "iter_0000013")


# A limit on the size of a file stands in for a full disk: the write fails in the same place.
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"


@pytest.mark.survives("no space for a save", "1 or 2 ranks")
@pytest.mark.parametrize("ranks, flags", [(1, []), (2, []), (2, IN_BACKGROUND)])
def test_a_failing_disk_is_one_line_and_keeps_what_was_saved(launch, fullbatch_arguments, stopped, ranks, flags):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")
              if not path.name.startswith(("arguments", "megatron"))}  # a start writes these
    run = launch(*fullbatch_arguments, "--load", stopped, "--save", stopped, "--save-interval", 13, *flags,
                 ranks=ranks, prelude=LIMIT)
    assert run.code == 2 and "Traceback" not in run.output
    assert len(run.errors) == 1
    assert f"--save {stopped}: cannot write iteration 13 (see the lines above; " in run.errors[0]
    assert f"start again with --load {stopped} (complete: iter_0000012)" in run.errors[0]
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}.items() >= {
        path: time for path, time in before.items() if path.is_file()}.items()
    assert find_iteration(stopped).name == "iter_0000012"
