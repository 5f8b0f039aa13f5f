"""Every file of a checkpoint, damaged in every way: it is refused in one line, or what is read of it is as it was."""
import dataclasses
import io
import random
import shutil
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from hrm_megatron.checkpoint import archive as archive_module
from hrm_megatron.checkpoint import retention
from hrm_megatron.checkpoint.archive import DamagedError, archives, check_archive, frame_digest, read_archive
from hrm_megatron.checkpoint.dcp import DCPFolder, _fill
from hrm_megatron.checkpoint.folders import TRACKER_FILE, find_iteration, is_complete, last_saved_first
from hrm_megatron.checkpoint.manifest import MANIFEST_FILE, METADATA_FILE, read_manifest
from hrm_megatron.checkpoint.verify import check_around_tensors, naming_another, share, verify
from hrm_megatron.config import ConfigError
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.native import read_native, write_native
from hrm_megatron.convert.table import table
from hrm_megatron.convert.to_megatron import write_megatron
from tests.damage import flip_bit_of_tensor

EPOCH = "fsdp2_epoch_1"


@pytest.fixture(scope="module")
def megatron(single_rank, golden, tmp_path_factory):
    """The folder that `--save` would name, with iteration 12 saved after iteration 10."""
    folder, source = tmp_path_factory.mktemp("damage") / "checkpoints", read_native(golden / "native_ckpt")
    for iteration in (10, 12):
        write_megatron(dataclasses.replace(source, iteration=iteration), folder)
    return folder


@pytest.fixture(scope="module")
def native(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "native"
    write_native(read_native(golden / "native_ckpt"), folder)
    return folder


@pytest.fixture
def copy(megatron, tmp_path):
    """Iterations 10 and 12, to be damaged."""
    return shutil.copytree(megatron, tmp_path / "checkpoints")


def facts(checkpoint):
    """All settings and all tensors that are read of a checkpoint."""
    tensors = {(part, entry.megatron): checkpoint.read(part, entry) for entry in table(checkpoint.architecture)
               for part in (sorted(checkpoint.parts) if entry.trained else ["raw"])}
    return (checkpoint.architecture, checkpoint.training, checkpoint.iteration, checkpoint.embedding_updates), tensors


def same(one, other):
    return one[0] == other[0] and one[1].keys() == other[1].keys() and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in ((one[1][key], other[1][key]) for key in one[1]))


def from_megatron(load):
    """What a run resumes from, verified before it is read."""
    folder = find_iteration(load)
    verify(folder)
    return facts(read_megatron(folder))


def from_native(load):
    return facts(read_native(load))


def flip(content, rng):
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)


def zero(content, rng):
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 16, 512, 4096]))
    content[start:end] = bytes(end - start)


def swap(content, rng):
    one, other = rng.randrange(len(content)), rng.randrange(len(content))
    content[one], content[other] = content[other], content[one]


def insert(content, rng):
    place = rng.randrange(len(content) + 1)
    content[place:place] = rng.randbytes(rng.choice([1, 2, 64]))


def insert_between_archives(content, rng):
    """Garbage in front of an archive of torch.save, or behind the last one."""
    places = [place for place in range(len(content)) if content[place:place + 4] == b"PK\5\6"]
    place = rng.choice(places) + archive_module.END_BYTES if places else len(content)
    content[place:place] = rng.randbytes(rng.choice([1, 64]))


def delete(content, rng):
    start = rng.randrange(len(content))
    del content[start:start + rng.choice([1, 2, 64])]


def cut(content, rng):
    del content[rng.randrange(len(content)):]


WAYS = (flip, zero, swap, insert, insert_between_archives, delete, cut)


def damaged(path, tries):
    """Damage a file in place, one way after the other, and put it right again; yields what was done."""
    whole = path.read_bytes()
    yield f"{path.name} missing", path.rename(path.with_name(f".{path.name}.away"))
    path.with_name(f".{path.name}.away").rename(path)
    rng = random.Random(path.name)
    for way in (*WAYS * tries, lambda content, rng: content.clear()):
        content = bytearray(whole)
        while content == whole:
            way(content, rng)
        path.write_bytes(content)
        yield f"{path.name}: {way.__name__}", path
    path.write_bytes(whole)


def outcomes(load, read, tries):
    """Read a checkpoint after each damage to each file; tell what was refused, harmless and silently other."""
    expected = read(load)
    refused, harmless, silent = [], [], []
    for path in sorted(path for path in load.rglob("*") if path.is_file() and "iter_0000010" not in path.parts):
        for what, _ in damaged(path, tries.get(path.suffix, 2)):
            try:
                found = read(load)
            except ConfigError as error:
                assert str(error).count("\n") == 0 and str(load) in str(error), error
                refused.append(what)
            else:
                (harmless if same(found, expected) else silent).append(what)
    assert same(read(load), expected)  # all is as it was
    return refused, harmless, silent


def test_no_damage_of_a_megatron_checkpoint_is_silent(copy):
    refused, harmless, silent = outcomes(copy, from_megatron, {".distcp": 14})
    assert not silent and len(refused) + len(harmless) >= 140
    # The manifest may be lost, and space added to files that are read as text; of all else every byte counts.
    assert f"{MANIFEST_FILE} missing" in harmless
    assert {what.partition(":")[0] for what in harmless} <= {f"{MANIFEST_FILE} missing", MANIFEST_FILE, TRACKER_FILE}


def test_no_damage_of_a_native_checkpoint_is_silent(native, tmp_path):
    refused, harmless, silent = outcomes(shutil.copytree(native, tmp_path / "native"), from_native, {".distcp": 6})
    assert not silent and len(refused) + len(harmless) >= 110
    assert {what.partition(":")[0] for what in harmless} <= {f"{MANIFEST_FILE} missing", MANIFEST_FILE}


@pytest.mark.parametrize("files, tries", [("*.distcp", 6), (METADATA_FILE, 8), ("metadata.json", 4)])
def test_without_a_manifest_no_tensor_is_silently_another(copy, files, tries):
    """Some damage of .metadata stays unseen, as its form is right; none of these cases changes what is read."""
    folder = copy / "iter_0000012"
    (folder / MANIFEST_FILE).unlink()
    expected, counted = from_megatron(copy), 0
    for path in folder.glob(files):
        for what, _ in damaged(path, tries):
            counted += 1
            try:
                assert same(from_megatron(copy), expected), what
            except ConfigError as error:
                assert str(error).count("\n") == 0
    assert counted == 7 * tries + 2


def test_torch_agrees_on_what_is_verified(megatron, torch_reads):
    """The oracle for `same`: what torch's own reader makes of a folder that verifies."""
    folder = find_iteration(megatron)
    verify(folder)
    stored, theirs = DCPFolder(folder), torch_reads(folder)
    assert theirs and all(torch.equal(stored.tensor(key), tensor) for key, tensor in theirs.items())


def test_a_file_of_another_iteration_is_refused_by_name(copy):
    shutil.copy(copy / "iter_0000010" / "__0_0.distcp", copy / "iter_0000012" / "__0_0.distcp")
    with pytest.raises(DamagedError, match=r"iter_0000012/__0_0\.distcp: not what was written there \(manifest\.json"):
        verify(copy / "iter_0000012")
    shutil.copy(copy / "iter_0000010" / MANIFEST_FILE, copy / "iter_0000012")
    with pytest.raises(DamagedError, match=r"manifest\.json: of iteration 10|\.metadata: not what was written"):
        verify(copy / "iter_0000012")


def faults_of(folder, ranks):
    """What each of so many ranks finds wrong with its share."""
    faults = []
    for rank in range(ranks):
        try:
            verify(folder, rank, ranks)
        except DamagedError as error:
            faults.append(str(error))
    return faults


def test_each_byte_is_read_by_one_rank_and_damage_found_by_one(copy):
    folder = find_iteration(copy)
    pieces, size = DCPFolder(folder).pieces(), (folder / "__0_0.distcp").stat().st_size
    for ranks in (1, 2, 3, 7, len(pieces) + 9):
        shares = [share(pieces, rank, ranks) for rank in range(ranks)]
        assert [piece for mine in shares for piece in mine] == pieces
        longest = max(piece.length for piece in pieces)
        assert max(sum(piece.length for piece in mine) for mine in shares) <= size / ranks + longest
    assert sum(verify(folder, rank, 3) for rank in range(3)) == size
    flip_bit_of_tensor(folder / "__0_0.distcp")
    faults = faults_of(folder, 3)
    assert len(faults) == 1 and "do not have the CRC32 that was written with them" in faults[0]


def test_each_file_is_looked_at_by_one_rank(copy, monkeypatch):
    """A checkpoint has a file for each rank: else the questions to storage grow with the square of the ranks."""
    folder, looked, stock = find_iteration(copy), [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: looked.append(path.name) or stock(path, **options))
    for rank in range(5):
        verify(folder, rank, 5)
    assert looked.count("__0_0.distcp") <= 4  # by .metadata, by the manifest, and twice for its digest
    (folder / "__0_0.distcp").unlink()
    faults = faults_of(folder, 5)
    assert any("__0_0.distcp: 0 bytes are there, .metadata promises" in fault for fault in faults)


def test_a_tracker_file_that_names_an_older_iteration_is_refused(copy):
    tracker = copy / TRACKER_FILE
    assert (find_iteration(copy).name, last_saved_first(copy)) == ("iter_0000012", ["iter_0000012", "iter_0000010"])
    tracker.write_text("10")
    with pytest.raises(DamagedError, match=r"names iter_0000010, but iter_0000012 was saved after it; say which one"):
        find_iteration(copy)
    assert find_iteration(copy, 10).name == "iter_0000010"
    (copy / "iter_0000012" / MANIFEST_FILE).unlink()  # as after a kill between the two files
    assert find_iteration(copy).name == "iter_0000010"


def test_going_back_and_on_from_there_needs_no_flag_later(copy, golden):
    write_megatron(dataclasses.replace(read_native(golden / "native_ckpt"), iteration=11), copy)
    assert [read_manifest(copy / f"iter_00000{n}").save for n in (10, 12, 11)] == [1, 2, 3]
    assert find_iteration(copy).name == "iter_0000011"


def test_what_a_finished_iteration_lacks_is_damage(copy):
    folder = copy / "iter_0000012"
    (folder / "metadata.json").unlink()
    assert is_complete(folder)
    with pytest.raises(ConfigError, match=r"metadata\.json: not there, manifest\.json says 63 bytes; .*; the newest "
                                          r"that verifies: --ckpt-step 10$"), naming_another(folder):
        verify(folder)
    (folder / MANIFEST_FILE).unlink()
    assert not is_complete(folder)


def test_an_iteration_that_its_run_deletes_meanwhile_is_not_called_damaged(copy):
    folder = find_iteration(copy)
    with pytest.raises(ConfigError, match=r"iter_0000012: was deleted or moved while it was read, .*; start again$"), \
            naming_another(folder):
        read_megatron(folder)
        retention.delete(copy, [12])
        retention.finish_deletion(copy)
        verify(folder)


def test_the_other_iteration_is_named_only_if_it_verifies(copy):
    for name in ("iter_0000010", "iter_0000012"):
        with (copy / name / "__0_0.distcp").open("r+b") as file:
            file.seek(9999)
            file.write(b"damage")
    with pytest.raises(ConfigError, match=r"no other in \S+ verifies$"), naming_another(copy / "iter_0000012"):
        read_megatron(copy / "iter_0000012").read("ema", table(read_megatron(copy / "iter_0000012").architecture)[-1])


def test_files_of_tensors_are_described_without_being_read(tmp_path, monkeypatch):
    """Else the manifest of a terabyte would cost a second pass over it."""
    monkeypatch.setattr(archive_module, "BLOCK_BYTES", 1 << 12)
    path, read_bytes = tmp_path / "__0_0.distcp", []
    with path.open("wb") as file:
        for value in (0.5, 2.0):
            torch.save(torch.full((1000, 1000), value), file)
    stock = archive_module._blocks
    monkeypatch.setattr(archive_module, "_blocks", lambda *range_: (
        read_bytes.append(len(block)) or block for block in stock(*range_)))
    digest = frame_digest(path)
    assert sum(read_bytes) < 2 * 2048 < path.stat().st_size / 100
    with path.open("rb") as file:
        read_bytes.clear()
        size = path.stat().st_size
        for found in archives(file, size):
            check_archive(file, found.start, found.end)
    assert max(read_bytes) == 1 << 12 and 8_000_000 < sum(read_bytes) < size
    content = bytearray(path.read_bytes())
    content[50] ^= 1  # padding of the first header: no reader looks at it, the digest does
    path.write_bytes(content)
    assert frame_digest(path) != digest


def test_crc32_and_places_are_those_of_the_standard_library():
    file = io.BytesIO()
    torch.save({"a": torch.arange(5.0), "b": [torch.ones(3, 4), torch.zeros(0)]}, file)
    found = read_archive(file, len(file.getvalue()))
    with zipfile.ZipFile(file) as opened:
        for name, start, size, crc in found.entries:
            assert opened.read(name) == file.getvalue()[start:start + size] and zlib.crc32(opened.read(name)) == crc
        assert len(found.entries) == len(opened.namelist()) > 7
    assert (found.start, found.end) == (0, len(file.getvalue()))


@pytest.mark.parametrize("size, boxes, covered", [
    ([5, 7], [([0, 0], [5, 7])], True), ([], [([], [])], True), ([0, 3], [], True), ([5], [], False),
    ([5, 7], [([0, 0], [3, 4]), ([0, 4], [3, 3]), ([3, 0], [2, 7])], True),
    ([5, 7], [([0, 0], [3, 4]), ([0, 3], [3, 3]), ([3, 0], [2, 7])], False),  # as many elements, one column twice
    ([4], [([0], [2]), ([3], [2])], False), ([4], [([-1], [5])], False), ([4, 1], [([0], [4])], False),
])
def test_pieces_are_the_whole_tensor(size, boxes, covered):
    assert _fill(size, boxes) == covered


def test_a_folder_without_manifest_says_so(golden, copy):
    assert "has no manifest.json" in read_native(golden / "native_ckpt_ws2").remark
    assert read_megatron(copy / "iter_0000012").remark == ""
    assert "was not verified" in read_megatron(copy / "iter_0000012", verify=False).remark
    check_around_tensors(DCPFolder(golden / "native_ckpt_ws2" / EPOCH))
