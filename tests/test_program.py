"""A program that is refused or stopped says one line and leaves nothing half-written, each of our tools included."""
import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data.tokenizer import check_output_folder
from hrm_megatron.program import Stopped, check_folder, check_outputs, whole_file, whole_folder, write_aside
from tests.stores import files_of

ROOT = Path(__file__).parents[1]
TOOLS = [*sorted((ROOT / "tools").glob("*.py")), ROOT / "examples" / "demo" / "run.py"]
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# pytest itself may have been started in the background, with SIGINT ignored; a program that a user starts is not.
DEFAULT_SIGNALS = "import os, signal\nfor number in (1, 2, 15): signal.signal(number, signal.SIG_DFL)\n" \
                  "signal.signal(2, signal.default_int_handler)\n"


def run(program, *arguments, ignoring=(), **options):
    """Run a Python program with default signals but those that it shall ignore."""
    ignore = "".join(f"signal.signal({int(number)}, signal.SIG_IGN)\n" for number in ignoring)
    return subprocess.run([sys.executable, "-c", DEFAULT_SIGNALS + ignore + program, *map(str, arguments)], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                          **options)


def stopped(done, number):
    return (done.returncode, done.stderr) == (128 + number, f"stopped by {signal.Signals(number).name}\n")


LISTEN = "from hrm_megatron.program import *\nfrom hrm_megatron import program\nlisten()\n"


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_runs_what_clears_away_and_ends_in_one_line(number):
    done = run(f"{LISTEN}try:\n  one_line(lambda: os.kill(os.getpid(), {int(number)}))\n"
               "except Exception: print('swallowed')\nfinally: print('cleared')")
    assert stopped(done, number) and done.stdout == "cleared\n"


@pytest.mark.parametrize("number", STOPS)
def test_an_ignored_signal_stays_ignored(number):
    done = run(f"{LISTEN}os.kill(os.getpid(), {int(number)})\nprint('went on')", ignoring=[number])
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_a_held_block_is_finished_first_and_the_last_signal_counts():
    kill = "os.kill(os.getpid(), signal.{})\n"
    done = run(f"{LISTEN}with signals_held():\n  with signals_held():\n    {kill.format('SIGINT')}  print('one')\n"
               f"  {kill.format('SIGTERM')}  print('two')\nprint('never')")
    assert stopped(done, signal.SIGTERM) and done.stdout == "one\ntwo\n"


def test_a_second_signal_does_not_disturb_the_clearing_away():
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    done = run(f"{LISTEN}try: {kill}\nfinally:\n  with signals_held():\n    {kill}\n    print('cleared')")
    assert stopped(done, signal.SIGINT) and done.stdout == "cleared\n"


def test_listening_for_a_block_gives_the_handlers_back():
    done = run("from hrm_megatron.program import listening\nbefore = [*map(signal.getsignal, (1, 2, 15))]\n"
               "with listening():\n  inside = [*map(signal.getsignal, (1, 2, 15))]\n"
               "print([*map(signal.getsignal, (1, 2, 15))] == before, inside != before)")
    assert done.stdout == "True True\n", done.stderr


def test_a_command_is_ended_in_peace_before_its_program():
    child = "import os, signal, sys\nsignal.signal(15, lambda *_: sys.exit(print('child ended')))\n" \
            "os.kill(os.getppid(), 15)\nwhile True: signal.pause()"
    done = run(f"{LISTEN}import sys\ntry: run_command([sys.executable, '-c', {child!r}])\nfinally: print('then we')")
    assert stopped(done, signal.SIGTERM) and done.stdout == "child ended\nthen we\n"


def test_refusals_are_one_line_and_a_closed_pipe_is_none():
    done = run("from hrm_megatron.config import ConfigError\nfrom hrm_megatron.program import one_line\nimport sys\n"
               "def refuse(): raise ConfigError('x=1: choose 2')\nsys.exit(one_line(refuse))")
    assert (done.returncode, done.stderr) == (1, "error: x=1: choose 2\n")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", "from hrm_megatron.program import one_line\nimport sys\n"
                               "sys.exit(one_line(lambda: print('made')))"], stdout=full, stderr=subprocess.PIPE,
                              cwd=ROOT, text=True, env={})
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device: 'standard output'\n")
    done = run("from hrm_megatron.program import one_line\nimport sys\n"
               "sys.exit(one_line(lambda: open('/nowhere/file')))")
    assert (done.returncode, done.stderr) == (1, "error: [Errno 2] No such file or directory: '/nowhere/file'\n")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", "from hrm_megatron.program import one_line\nimport sys\n"
                           "sys.exit(one_line(lambda: print('x' * 100_000)))"], stdout=write, stderr=subprocess.PIPE,
                          cwd=ROOT, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_closed_streams_are_no_failure_and_their_numbers_are_no_files(tmp_path):
    """Else an output would get the number of stdout, and with it what libraries print."""
    program = (f"{LISTEN}import sys\ndef work():\n  print(1, sys.stdin.read())\n  print(2, file=sys.stderr)\n"
               "  with open('out', 'w') as file: file.write(str(file.fileno()))\nsys.exit(one_line(work))")
    subprocess.run(["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", program], check=True,
                   cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert int((tmp_path / "out").read_text()) > 2


def test_a_refusal_ends_so_too_where_nobody_reads_what_was_said_before():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", f"{LISTEN}import sys\ndef refuse():\n  print('some')\n"
                           "  raise ConfigError('x=1: choose 2')\nsys.exit(one_line(refuse))"], stdout=write,
                          stderr=subprocess.PIPE, cwd=ROOT, text=True, env={})  # it may say PYTHONUNBUFFERED
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "error: x=1: choose 2\n")


@pytest.mark.parametrize("error, code, said", [
    ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\\nMore')", 1,
     "error: GPU memory is full (CUDA out of memory. Tried to allocate 2 GiB.); free it, or hide the GPU: CUDA_VISIBLE_"
     "DEVICES=\n"),
    ("RuntimeError('CUDA error: out of memory\\nCUDA kernel errors might')", 1, "error: GPU memory is full (CUDA err"),
    ("RuntimeError('shape')", 1, "Traceback"),
])
def test_a_full_gpu_is_one_line(error, code, said):
    done = run(f"{LISTEN}import sys, torch\ndef fill(): raise {error}\nsys.exit(one_line(fill))")
    assert done.returncode == code and done.stderr.startswith(said), done.stderr


def test_garbage_is_collected_again_once_all_is_imported():
    done = run(f"{LISTEN}import gc, sys\nbefore = gc.get_freeze_count()\nprint(gc.isenabled())\n"
               "sys.exit(one_line(lambda: print(gc.isenabled(), gc.get_freeze_count() > before)))")
    assert (done.returncode, done.stdout) == (0, "False\nTrue True\n"), done.stderr


def test_a_terminal_without_a_character_gets_it_spelled_out():
    done = run("from hrm_megatron.program import one_line\nimport sys\nsys.stdout.reconfigure(encoding='ascii')\n"
               "sys.exit(one_line(lambda: print('7', chr(0x2588), chr(0xdcff))))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "7 \\u2588 \\udcff\n", "")


@contextlib.contextmanager
def full_disk():
    """Let no file of this process grow beyond 100 bytes, as on a disk that is full; pytest's own output may be one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    write_aside(file, "before")
    with full_disk(), pytest.raises(OSError) as raised:
        write_aside(file, "x" * 101)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(file))
    assert file.read_text() == "before" and [*tmp_path.iterdir()] == [file]


def test_what_a_killed_run_left_beside_a_folder_is_named_and_kept(tmp_path, caplog):
    left = [tmp_path / ".[a].partial-1", tmp_path / ".[a].replaced-1"]
    for folder in (*left, tmp_path / ".a.partial-2"):
        folder.mkdir()
    with whole_folder(tmp_path / "[a]"):
        pass
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [*map(str, left)]
    assert {*left, tmp_path / "[a]"} < {*tmp_path.iterdir()}


def test_a_folder_is_on_the_disk_before_its_name_and_that_before_the_old_one_goes(tmp_path, monkeypatch):
    place, sync, rename, remove, done = tmp_path / "a", os.fsync, Path.rename, shutil.rmtree, []

    def name(path):
        relative = Path(path).relative_to(tmp_path)
        first = re.sub("^\\.a\\.(.*)-.*", r"\1", relative.parts[0]) if relative.parts else "around"
        return str(Path(first, *relative.parts[1:]))

    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(name(os.readlink(f"/proc/self/fd/{fd}"))), sync(fd)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(f"{name(path)} > {name(to)}"), rename(path, to)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (done.append(f"no {name(path)}"), remove(path, **how)))
    place.mkdir()
    with whole_folder(place) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").touch()
    assert sorted(done[:3]) == ["partial", "partial/sub", "partial/sub/file"]
    assert done[3:] == ["a > replaced", "partial > a", "around", "no partial", "no replaced"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.EBADF, errno.EOPNOTSUPP, errno.EIO])
def test_folders_that_cannot_be_synced_are_written_all_the_same(tmp_path, monkeypatch, number):
    def sync(descriptor):
        raise OSError(number, "why")

    monkeypatch.setattr(os, "fsync", sync)
    with whole_folder(tmp_path / "a"):
        pass
    with pytest.raises(OSError, match="why"), whole_folder(tmp_path / "b") as partial:
        (partial / "file").touch()
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, there):
    places = [tmp_path / "far" / name for name in ("folder", "file")]
    links = [tmp_path / place.name for place in places]
    if there:
        (places[0] / "old").mkdir(parents=True)
        places[1].write_text("old")
    for link, place in zip(links, places, strict=True):
        link.symlink_to(place)
    with whole_folder(links[0]) as partial:
        assert partial.parent == places[0].parent
        (partial / "new").touch()
    write_aside(links[1], "new")
    assert [link.readlink() for link in links] == places
    assert [path.name for path in places[0].iterdir()] == ["new"] and places[1].read_text() == "new"
    assert {*tmp_path.iterdir()} == {*links, tmp_path / "far"} and {*(tmp_path / "far").iterdir()} == {*places}


def test_what_stops_the_writer_leaves_nothing_half_written(tmp_path):
    with pytest.raises(Stopped), whole_file(tmp_path / "a.png") as partial:
        partial.write_text("half")
        assert partial.suffix == ".png" and partial.parent == tmp_path
        raise Stopped(130)
    assert not [*tmp_path.iterdir()]


def test_a_written_file_takes_the_mode_of_the_one_it_replaces(tmp_path):
    new, old = tmp_path / "made" / "new", tmp_path / "old"
    old.touch()
    old.chmod(0o604)
    umask = os.umask(0o027)
    try:
        write_aside(new, b"1")
        write_aside(old, "2")
    finally:
        os.umask(umask)
    assert [path.stat().st_mode & 0o777 for path in (new, old)] == [0o640, 0o604]
    assert new.read_bytes() == b"1" and old.read_text() == "2"


@pytest.mark.parametrize("place", ["folder", "file/a.json"])
def test_what_cannot_be_written_is_named_by_its_own_name(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=re.escape(str(tmp_path / place).removesuffix("/a.json"))) as raised:
        write_aside(tmp_path / place, "x")
    assert ".partial" not in str(raised.value)


@pytest.mark.parametrize("outputs, said", [
    ({"--png": "a.pdf"}, "--png a.pdf: the name of this file must end with .png"),
    ({"--json": "folder"}, "--json folder: is a folder; name a file in it"),
    ({"--json": "file/a/b.json"}, "--json file/a/b.json: nothing can be written in .*/file;"),
    ({"--png": "a.png", "--json": "./a.png"}, "--json a.png: is what --png names too"),
    ({"--png": "a.png", "--json": "link"}, "--json link: is what --png names too"),
])
def test_what_could_not_be_written_is_refused_before_the_work(tmp_path, monkeypatch, outputs, said):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    Path("link").symlink_to("a.png")
    check_outputs({"--png": Path("new/a.png"), "--json": Path("file"), "--text": None})
    with pytest.raises(ConfigError, match=f"^{said}"):
        check_outputs({flag: Path(path) for flag, path in outputs.items()})


def test_what_is_read_is_not_written_over(tmp_path):
    read, link = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    read.touch()
    link.symlink_to(read)
    inputs = {"--input": read, "--other": None, "--third": tmp_path / "missing"}
    check_outputs({"--json": tmp_path / "c.jsonl", "--png": tmp_path / "missing.png"}, inputs=inputs)
    with pytest.raises(ConfigError, match=r"^--json .*b.jsonl: is what --input reads, and would be lost; give another"):
        check_outputs({"--json": link}, inputs=inputs)


@pytest.mark.parametrize("folder, said", [
    ("/proc", "is a mount point, which no folder replaces; name a folder in it"),
    (".", "is the current folder, or around it, and another would take its place"),
    ("..", "is the current folder, or around it"),
    ("file/new", "nothing can be written in .*/file; choose another place"),
])
def test_a_folder_that_could_not_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch, folder, said):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("file").touch()
    Path("link").symlink_to(folder)
    for name in (folder, "link"):
        with pytest.raises(ConfigError, match=f"^--save {re.escape(name)}: {said}"):
            check_folder("--save", Path(name))
        with pytest.raises(ConfigError, match=f"^--output {re.escape(name)}: {said}"):
            check_output_folder(Path(name), overwrite=True)


def test_a_folder_of_what_is_read_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    Path("link").symlink_to("out")
    check_folder("--save", Path("out"), {"--rows": Path("output"), "--other": None, "--third": Path("out/..")})
    for read in ("out", "link", "out/new/rows.json"):
        with pytest.raises(ConfigError, match=f"^--save link: holds what --rows reads .{read}., which would be lost"):
            check_folder("--save", Path("link"), {"--other": Path("file"), "--rows": Path(read)})


# Stops at the first import that may take long, of whatever a program needs besides listening.
STOP_AT_AN_IMPORT = """import runpy, sys
class Stop:
    def find_spec(self, name, *rest):
        root, _, module = name.partition(".")
        if root not in sys.stdlib_module_names and module not in ("", "config", "model_types", "program"):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), 15)
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.meta_path.insert(0, Stop())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.name)
def test_every_tool_listens_before_it_imports(path):
    assert stopped(run(STOP_AT_AN_IMPORT, path), signal.SIGTERM)


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "rows.jsonl"
    path.write_text("".join(f'{{"condition": "", "instruction": "What is {i} + 1?", "response": "{i + 1}"}}\n'
                            for i in range(3_000)))
    return path


def run_tool(name, prelude, *arguments):
    """Run a tool in a group of its own, after a prelude."""
    program = f"import runpy, sys\n{prelude}\nrunpy.run_path({str(ROOT / 'tools' / name)!r}, run_name='__main__')"
    return run(program, *arguments, start_new_session=True)


def preprocess(prelude, rows, prefix, workers):
    """Return the exit status and what was said, but for the shape of the rows and what the golden tokenizer loses."""
    done = run_tool("preprocess_data.py", prelude, "--input", rows, "--output-prefix", prefix,
                    "--tokenizer-model", ROOT / "tests" / "golden" / "tokenizer", "--tokenizer-engine", "tokenizers",
                    "--workers", workers)
    return done.returncode, [line for line in done.stderr.splitlines()
                             if "bytes have no token" not in line and not line.startswith("row shape:")]


def test_a_stopped_training_of_a_tokenizer_leaves_nothing(rows, tmp_path):
    done = run_tool("train_tokenizer.py", "from hrm_megatron.data import tokenizer\n"
                    "tokenizer.json.dumps = lambda *a, **k: os.kill(os.getpid(), 15) or '{}'",
                    "--input", rows, "--output", tmp_path / "new" / "tokenizer", "--vocab-size", 300)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (143, "stopped by SIGTERM")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("workers, number", [(1, signal.SIGTERM), *((2, number) for number in STOPS)])
def test_a_stopped_preprocessing_leaves_nothing(rows, tmp_path, workers, number):
    """The signal goes to the whole group, as a terminal sends it, while workers are busy."""
    stop = ("from hrm_megatron.data import preprocess\ncut = preprocess.pieces\n"
            "preprocess.pieces = lambda path, size, rows, readers: cut(path, 2000, rows, readers)\n"
            "from hrm_megatron.data.shards import ShardWriter as writer\nadd = writer.add\n"
            "def stop(self, *more):\n  add(self, *more)\n"
            f"  if self.examples > 20: os.killpg(0, {int(number)})\nwriter.add = stop")
    status, said = preprocess(stop, rows, tmp_path / "new" / "x", workers)
    assert (status, said) == (128 + number, [f"stopped by {signal.Signals(number).name}"])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_signal_among_the_renames_lets_them_finish(rows, tmp_path):
    rename = "replace = os.replace\ndef stop(a, b):\n  replace(a, b)\n  os.kill(os.getpid(), 15)\nos.replace = stop"
    assert preprocess(rename, rows, tmp_path / "new" / "x", 1) == (128 + signal.SIGTERM, ["stopped by SIGTERM"])
    shard = [path.name for path in (tmp_path / "new" / "x.shards").glob("[!.]*")]
    assert len(shard) == 5 and sum(name.startswith("source-") for name in shard) == 1  # finished, and noted as such
    assert preprocess("", rows, tmp_path / "new" / "x", 1)[0] == 0
    assert len(files_of(tmp_path / "new" / "x")) == 5


def test_a_stopped_plan_leaves_nothing(tmp_path):
    """Training leaves signals to Megatron and its launcher; while a plan is written they clear away."""
    done = run("import sys\nimport numpy as np\nfrom hrm_megatron.data.plan import RowPlan\n"
               "from tests.data.walks import ListWalk\nsave = np.save\n"
               "def stop(*a, **k):\n  save(*a, **k)\n  os.kill(os.getpid(), 15)\nnp.save = stop\n"
               "RowPlan(ListWalk(lambda epoch: np.full(9, 3), 1), 6, 1, cache_folder=sys.argv[1]).rows_of_epoch(0)",
               tmp_path / "cache")
    assert stopped(done, signal.SIGTERM) and not list((tmp_path / "cache").iterdir())
