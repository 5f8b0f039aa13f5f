"""Ranks that run other code, or read other data, than rank 0 are found before the first step."""
import shutil

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.training.agreement import SAMPLE_BYTES, SAMPLES, compare, digest
from hrm_megatron.training.error_file import RestartableError
from tests.training.conftest import FULLBATCH


def test_a_digest_sees_names_sizes_and_bytes(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"12"), second.write_bytes(b"3")
    seen = {digest([first, second])}
    assert digest([second, first]) in seen
    second.write_bytes(b"4")
    seen.add(digest([first, second]))
    first.write_bytes(b"124"), second.write_bytes(b"")
    seen.add(digest([first, second]))
    seen.add(digest([first]))
    seen.add(digest([first.rename(tmp_path / "c")]))
    assert len(seen) == 5


@pytest.mark.parametrize("place", [0, SAMPLES * SAMPLE_BYTES // 2, -1])
def test_a_large_file_is_sampled_from_its_first_byte_to_its_last(tmp_path, place):
    size = 3 * SAMPLES * SAMPLE_BYTES
    content = bytearray(size)
    (tmp_path / "large").write_bytes(content)
    before = digest([tmp_path / "large"])
    step = (size - SAMPLE_BYTES) / (SAMPLES - 1)
    content[int(step * 20) + 5 if place > 0 else place] = 1
    (tmp_path / "large").write_bytes(content)
    assert digest([tmp_path / "large"]) != before


def test_the_first_difference_is_named():
    rank = dict(node="n0", code="c", data="d", checkpoint="run/iter_0000004")
    compare([rank] * 4)
    with pytest.raises(ConfigError, match=r"the data of 2 of 4 ranks, the first of them 2 \(on n1\), is not that of "
                                          r"rank 0 \(on n0\): let every node read the same files"):
        compare([rank, rank, {**rank, "node": "n1", "data": "x"}, {**rank, "node": "n1", "data": "y"}])
    with pytest.raises(ConfigError, match=r"the code of 1 of 2 ranks, .* on every node"):
        compare([rank, {**rank, "code": "x"}])
    for other in ("run/iter_0000006", "pretrained/iter_0000004"):
        with pytest.raises(RestartableError, match=r"the checkpoint of 1 of 2 ranks, .* start again"):
            compare([rank, {**rank, "checkpoint": other}])


OTHER_DATA = """
import os, sys
if os.environ["RANK"] == "1":
    sys.argv = [word + "_of_rank_1" if word.endswith("/data") else word for word in sys.argv]
"""
OTHER_CODE = """
import os
from hrm_megatron.training import agreement
if os.environ["RANK"] == "1":
    agreement.PACKAGES = ("torch",)
"""


OTHER_CHECKPOINT = """
import os
from pathlib import Path
from hrm_megatron import pretrain
if os.environ["RANK"] == "1":
    pretrain.check_checkpoint = lambda *_: (Path("iter_0000006"), True)
"""


@pytest.mark.parametrize("prelude, words", [
    (OTHER_DATA, "the data of 1 of 2 ranks"), (OTHER_CODE, "the code of 1 of 2 ranks"),
    (OTHER_CHECKPOINT, "the checkpoint of 1 of 2 ranks")])
def test_a_run_does_not_begin(launch, fullbatch_arguments, tmp_path, prelude, words):
    for name in ("data", "data_of_rank_1"):
        shutil.copytree(FULLBATCH / "sampled", tmp_path / name)
    with (tmp_path / "data_of_rank_1" / "epoch_0" / "inst_start.npy").open("r+b") as file:
        file.seek(-8, 2)
        last = file.read(1)
        file.seek(-8, 2)
        file.write(bytes([last[0] ^ 1]))
    run = launch(*fullbatch_arguments, "--sampled-data-path", tmp_path / "data", "--save", tmp_path / "saved", ranks=2,
                 prelude=prelude)
    assert run.code == 2 and "Traceback" not in run.output
    assert len(run.errors) == 1 and words in run.errors[0] and not (tmp_path / "saved").exists()
