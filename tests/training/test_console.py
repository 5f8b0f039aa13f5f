"""What a user sees of a run: few lines, the facts before step 1, a refusal as the last; the rest is in files."""
import fcntl
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.data.indexed_examples import IndexedExamples, IndexedExamplesWriter
from hrm_megatron.data.mixture import Mixture, Selection
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.parallel.log_levels import UNACTIONABLE, WARNINGS, be_quiet, silence_unactionable
from hrm_megatron.planner.flops import rows_flops, training_flops
from hrm_megatron.training.console import ARGUMENTS_FILE, Console
from hrm_megatron.training.error_file import OneLineErrors, one_line
from hrm_megatron.training.memory import LESS_MEMORY
from hrm_megatron.training.reporting import IntervalMeans
from tests.training.conftest import FULLBATCH, GOLDEN, scalars

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
            "hrm_megatron.pretrain"]
STEPS, ROWS_PER_STEP, ROW_TOKENS, SEED = 4, 8, 96, 7
SIZES = ["--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", ROW_TOKENS,
         "--global-batch-size", ROWS_PER_STEP, "--micro-batch-size", 2, "--lr", 4e-3, "--log-interval", 1,
         "--train-iters", STEPS, "--seed", SEED]
SAMPLED = ["--sampled-data-path", FULLBATCH / "sampled", "--eval-iters", 0]
MOST_LINES = 30
NAMES = ("lm loss", "accuracy", "exact accuracy")


def torchrun(*arguments):
    return subprocess.run([*TORCHRUN, *map(str, arguments)], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=GOLDEN.parents[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps on two ranks, as a user starts them: two validations, two saves."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = TextTokenizer(GOLDEN / "tokenizer")
    for name, count in (("train", 90), ("valid", 20)):
        with IndexedExamplesWriter(folder / name, tokenizer) as writer:
            for i in range(count):
                writer.add(tokenizer.encode_prefix("direct", "x" * (i % 7) + str(i)),
                           tokenizer.encode_response("a" * (1 + i % 5)))
    done = torchrun(*SIZES, "--train-data-path", folder / "train", "--valid-data-path", folder / "valid",
                    "--eval-interval", 2, "--eval-iters", 1, "--save", folder / "saved", "--save-interval", 2,
                    "--tensorboard-dir", folder / "log", "--log-throughput", "--log-timers-to-tensorboard",
                    "--log-loss-by-source", "--run-report", folder / "report.html",
                    "--bp-warmup-fraction", 0.6)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, said=done.stdout.splitlines(), errors=done.stderr)


def test_a_run_says_little(run):
    assert len(run.said) < MOST_LINES, run.said
    assert not [remark for remark in UNACTIONABLE if re.search(remark.text, run.errors + "\n".join(run.said))]
    assert "Warning" not in run.errors


def test_what_the_run_is_stands_before_step_1(run):
    begin = next(i for i, line in enumerate(run.said) if line.startswith("step "))
    topics = [line.split(":")[0] for line in run.said[:begin] if not line.startswith(" ")]
    assert topics == ["model", "layers", "weight gradients", "attention", "layout", "data", "data", "data",
                      "checkpoint", "schedule", "log"]
    facts = "\n".join(run.said[:begin])
    for part in ("HRM of 0.1", "2 ranks = TP 1 x PP 1 x CP 1 x DP 2", "validation: 20 examples",
                 "data: --log-loss-by-source: all examples are of train, whose curve is that of the loss",
                 f"checkpoint: new weights; saves every 2 steps and at the end to {run.folder / 'saved'}",
                 "schedule: steps 1 to 4 of 768 tokens; lr 0.004 after 0 steps of warm-up, constant; bp_steps 3 to 5"):
        assert part in facts


def test_steps_validations_and_saves_are_a_line_each(run):
    begin = next(i for i, line in enumerate(run.said) if line.startswith("step "))
    *told, report = [re.sub(r"\s+", " ", line) for line in run.said[begin:]]
    assert report == f"report: {run.folder / 'report.html'}"
    assert [line.split(" ")[1] for line in told] == [f"{step}/4" for step in (1, 2, 2, 2, 3, 4, 4, 4)]
    assert [" saved in " in line for line in told].count(True) == 2
    assert [" validation: loss " in line for line in told].count(True) == 2  # its end is not validated once more
    losses, bp = scalars(run.folder / "log"), scalars(run.folder / "log", "bp steps")
    steps = [line for line in told if " tokens/s" in line]
    for step, line in enumerate(steps, 1):
        assert line.startswith(f"step {step}/4 loss {losses[step]:.4f} exact ") and line.endswith(" left")
        assert f" bp {bp[step]:g} lr 4.00e-03 " in line
    assert all(len(line) <= 120 for line in run.said[begin:-1] if " saved in " not in line)
    validation = scalars(run.folder / "log", "lm loss validation")
    assert f"step 2/4 validation: loss {validation[2]:.4f} accuracy " in "\n".join(told)


def test_what_megatron_says_is_in_the_folder_of_the_run(run):
    saved = run.folder / "saved"
    arguments = (saved / ARGUMENTS_FILE).read_text().splitlines()
    assert len(arguments) > 700 and any(re.fullmatch(r"hidden_size \.+ 32", line) for line in arguments)
    first, last = ((saved / f"megatron.rank{rank}.log").read_text() for rank in (0, 1))
    assert "------------------------ arguments ------------------------" in first
    assert re.search(r"^ \[.*\] iteration +4/ +4 \| consumed samples: +32 \|.* lm loss: ", last, re.M)
    assert "validation loss at iteration 4" in last
    for formula in ("Theoretical memory footprints", "Total number of parameters in billions"):
        assert formula not in first + last


def test_tensorboard_has_what_it_always_had(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run.folder / "log"))
    log.Reload()
    trained = [*NAMES, "bp steps", "tokens per second", "learning-rate", "batch-size", "loss-scale", "grad-norm"]
    plain = [*trained, *(f"{name} validation" for name in NAMES)]
    timed = {name for name in log.Tags()["scalars"] if name.endswith(("-time", "-throughput", "throughput"))}
    ours = {"seconds of save", "loss by source/train"}
    assert set(log.Tags()["scalars"]) - timed == {*plain, *(f"{name} vs samples" for name in plain), *ours}
    assert timed == {"iteration-time", "throughput"}


def test_the_loss_of_the_only_source_is_that_of_all(run):
    losses, of_source = (scalars(run.folder / "log", name) for name in ("lm loss", "loss by source/train"))
    assert of_source == pytest.approx(losses, rel=1e-6) and len(losses) == STEPS  # sums in fp32 and in fp64


def test_a_save_says_how_long_it_stalled_the_run(run):
    seconds = scalars(run.folder / "log", "seconds of save")
    assert seconds.keys() == {2, 4} and min(seconds.values()) > 0


def test_a_report_is_written_when_training_is_done(run):
    page = (run.folder / "report.html").read_text()
    validation = scalars(run.folder / "log", "lm loss validation")
    assert f"<td>validation</td><td>{STEPS}</td><td>{validation[STEPS]:.4f}</td>" in page
    assert "<td>last step</td><td>4 of 4</td>" in page and page.count("<td>complete</td>") == 2
    assert [path.name for path in run.folder.glob("*report*")] == ["report.html"]
    assert f"report: {run.folder / 'report.html'}" in run.said


def test_throughput_is_that_of_an_hrm(run):
    source = IndexedExamples(run.folder / "train")
    data = PackedRows(Mixture([source], ROW_TOKENS, Selection(seed=SEED)), ROW_TOKENS, SEED, ROWS_PER_STEP * STEPS)
    rows = [data[i] for i in range(len(data))]
    labels = sum(int((row["labels"] >= 0).sum()) for row in rows) / STEPS
    # Queries of a prefix see all of it and nothing else; those of a response, what lies before and themselves.
    scores = sum(p + max(0, q - p + 1) for row in rows for p, r in zip(
        row["prefix_lengths"].tolist(), row["response_lengths"].tolist(), strict=True) if p
        for q in range(p + r)) / STEPS
    architecture = Architecture(2, 32, 4, 256, source.vocab_size)
    seconds, throughput = (scalars(run.folder / "log", name) for name in ("iteration-time", "throughput"))
    bp = scalars(run.folder / "log", "bp steps")
    for step in (2, 3, 4):
        flops = throughput[step] * 1e12 * 2 * seconds[step]  # of two ranks
        expected = training_flops(architecture, int(bp[step]), ROW_TOKENS * ROWS_PER_STEP, labels, scores)
        assert flops == pytest.approx(expected, rel=1e-5)  # fp32 in the log, and three roundings


def test_rows_flops_is_a_sum_over_rows():
    architecture = Architecture(num_layers=3, hidden_size=32, num_attention_heads=4, ffn_hidden_size=96, vocab_size=90)
    rows = [[(3, 4), (5, 0)], [(1, 1)]]
    scores = (9 + 12 + 10) + 25 + (1 + 1 + 1)
    assert rows_flops(architecture, 5, 13, rows) == training_flops(architecture, 5, 26, 5 + 1 + 2, scores)


@pytest.mark.slow  # tests/training/test_bad_input.py holds the one line, the test below what torchrun makes of it
def test_a_refused_command_ends_with_its_one_line():
    done = torchrun(*SIZES, *SAMPLED, "--hidden-size", 33)
    line = "error: hidden_size=33 is not a multiple of num_attention_heads=4; change one of them"
    assert done.returncode and done.stdout == "" and done.stderr.splitlines()[0] == line, done.stderr
    cause = done.stderr.split("Root Cause")[-1].splitlines()
    # Of rank 0, but for a machine on which that takes seconds longer than rank 1.
    assert re.search(r"rank +: [01] ", "".join(cause)) and cause[-2].endswith(line.removeprefix("error: "))


@pytest.mark.parametrize("ranks", [1, 3])
def test_torchrun_repeats_the_line_of_every_rank(ranks, tmp_path, monkeypatch):
    errors = {"a ConfigError": ConfigError("--x 3: too many; choose 2"),
              "no memory": torch.OutOfMemoryError("CUDA out of memory. Tried.\nMore.")}
    expected = {"a ConfigError": "error: --x 3: too many; choose 2",
                "no memory": f"error: rank 0: CUDA out of memory. Tried. {LESS_MEMORY}"}
    for name, error in errors.items():
        failures = {}
        for rank in range(ranks):
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
            OneLineErrors(0).record_exception(error)
            failures[rank] = ProcessFailure(rank, 100 + rank, 2, str(tmp_path / f"{rank}.json"))
        screen = ChildFailedError("hrm_megatron.pretrain", failures).format_msg().splitlines()
        assert [line for line in screen if "traceback" in line] == [f"  traceback : {expected[name]}"] * ranks
        assert "traceback" in screen[-2]


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert one_line(ZeroDivisionError("x"), 0) is None
    try:
        _ = 1 / 0
    except ZeroDivisionError as error:
        OneLineErrors(0).record_exception(error)
    stack = json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"]
    assert stack.startswith("Traceback") and "_ = 1 / 0" in stack


def test_verbose_prints_what_megatron_prints(launch, tmp_path):
    run = launch(*SIZES, *SAMPLED, "--exit-interval", 1, "--verbose", "--save", tmp_path / "saved")
    assert run.code == 0, run.output
    for part in ("---- arguments ----", "  hidden_size ....", " iteration        1/       4 | ", "\nstep 1/4  loss ",
                 "INFO:megatron.core."):
        assert part in run.output
    assert "\nlog: arguments and what Megatron prints are below" in run.output
    assert (tmp_path / "saved" / ARGUMENTS_FILE).exists() and not [*(tmp_path / "saved").glob("megatron*")]


def test_an_unknown_flag_is_one_line(launch):
    unknown = launch("--hiden-size", 3)
    assert (unknown.code, unknown.output) == (
        2, "error: command line: unrecognized arguments: --hiden-size 3; did you mean --hidden-size?\n")


@pytest.fixture
def terminal():
    """A terminal of 80 columns: `stream` writes to it, `read()` returns all that was written."""
    ours, theirs = pty.openpty()
    end = b"the end"

    def read():
        os.write(theirs, end)
        written = b""
        while not written.endswith(end):  # the kernel hands it on in pieces, when it comes to it
            written += os.read(ours, 1 << 16)
        return written.removesuffix(end).decode().replace("\r\n", "\n")

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(theirs, "w", encoding="utf-8") as stream:
        yield SimpleNamespace(stream=stream, read=read)
    os.close(ours)


def test_a_terminal_gets_a_bar_below_the_lines(terminal):
    console = Console(0, 1)
    console.out = terminal.stream
    with console:
        console.settle(None, verbose=False)
        logging.getLogger("hrm_megatron.test").info("layers: %s", "word " * 30)
        console.begin({})
        assert console.width == 80
        for step in (1, 2, 3):
            console.line(f"step {step}")
            console.progress(step, 4)
    lines = terminal.read().split("\n")
    assert lines[0].startswith("layers: word word") and lines[1].startswith("    word") and len(lines[0]) <= 80
    assert max(len(piece) for line in lines for piece in line.split("\r")) <= 80
    written = [line.split("\r")[-1] for line in lines]
    assert [line for line in written if line.startswith("step")] == ["step 1", "step 2", "step 3"]
    bars = re.findall(r"(\d+)% \|\S* *\| step (\d)/4", "\n".join(lines))
    assert {("25", "1"), ("50", "2")} <= set(bars)
    assert written[-1] == ""  # cleared at the end


def test_no_bar_where_there_is_no_terminal(capsys):
    with Console(0, 1) as console:
        console.settle(None, verbose=False)
        console.begin({})
        console.progress(1, 4)
        assert console.bar is None
    assert capsys.readouterr().out.startswith("log: arguments and what Megatron prints are nowhere without --save")


def test_what_asks_for_attention_is_shown_and_the_rest_kept(tmp_path, capsys):
    shown = ["WARNING: could not find x", "[exiting program at iteration 3] datetime: now",
             "--x is deprecated and has no effect", "Exiting during evaluation, timelimit reached"]
    kept = ["  ckpt_save_deprecated ..... False", "  error_injection_rate ..... 0", " iteration 1/2 | lm loss: 3",
            "WARNING: one_logger package is required", "WARNING: could not find the metadata file x"]
    with Console(0, 2) as console:
        print(shown[0])
        print(kept[0])
        console.settle(str(tmp_path / "run"), verbose=False)
        assert not (tmp_path / "run").exists()  # a run that is refused leaves nothing
        console.begin({"b": 2, "a": None})
        print("\n".join(shown[1:] + kept[1:]))
        print("begun ", end="")
        print("and ended")
        logging.getLogger("hrm_megatron.test").warning("%d bytes have no token", 3)
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if not line.startswith("log: ")] == [*shown, "warning: 3 bytes have no token"]
    log = (tmp_path / "run" / "megatron.rank0.log").read_text().splitlines()
    assert log == [shown[0], kept[0], *shown[1:], *kept[1:], "begun and ended"]
    assert (tmp_path / "run" / ARGUMENTS_FILE).read_text().splitlines() == [
        f"a {'.' * 47} None", f"b {'.' * 47} 2", f"started_in {'.' * 38} {Path.cwd()}"]


def test_ranks_between_keep_no_file_and_say_who_they_are(tmp_path, capsys):
    with Console(1, 3) as console:
        console.settle(str(tmp_path / "run"), verbose=False)
        console.begin({})
        print("Warning: one thing")
        print("another")
    assert capsys.readouterr().out == "rank 1: Warning: one thing\n" and not (tmp_path / "run").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
def test_a_disk_that_fills_up_ends_the_log_and_not_the_run(tmp_path, capsys):
    """Nor does it hide what ends the run: closing the log writes once more what the disk has not taken."""
    (tmp_path / "megatron.rank0.log").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="cannot write iteration 4"), Console(0, 1) as console:
        console.settle(str(tmp_path), verbose=False)
        console.begin({})
        print("a line of Megatron")
        print("another")
        raise ConfigError("cannot write iteration 4")
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"warning: {tmp_path}: no more of Megatron's log here (No space left on device)"]


def test_a_refusal_leaves_nothing_and_a_failure_its_traces(tmp_path, capsys):
    for error, facts, files in ((ConfigError("no"), [], []),
                                (ZeroDivisionError(), ["layers: local"], ["megatron.rank0.log"])):
        with pytest.raises(type(error)), Console(0, 1) as console:
            console.settle(str(tmp_path / "run"), verbose=False)
            logging.getLogger("hrm_megatron.test").info("layers: local")
            raise error
        assert capsys.readouterr().out.splitlines()[:1] == facts
        assert [path.name for path in tmp_path.glob("run/*")] == files
    with pytest.raises(SystemExit), Console(0, 1):
        print("usage: all of --help")
        raise SystemExit(0)
    assert capsys.readouterr().out == "usage: all of --help\n"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot keep the run's log there .*; mend that"), Console(0, 1) as console:
        console.settle(str(tmp_path / "file" / "run"), verbose=False)
        console.begin({})


def test_stdout_and_logging_are_given_back(capsys):
    root, own, out = logging.getLogger(), logging.getLogger("hrm_megatron"), sys.stdout
    before = [*root.handlers], [*own.handlers], own.level, own.propagate
    with Console(0, 1) as console:
        console.settle(None, verbose=False)
    assert ([*root.handlers], [*own.handlers], own.level, own.propagate) == before and sys.stdout is out


def test_means_are_over_the_steps_since_the_last_line():
    means = IntervalMeans()
    assert means.take() == {}
    for loss, bp in ((4.0, 2.0), (1.0, 3.0)):
        means.add({"lm loss": torch.tensor(loss), "bp steps": torch.tensor([bp])})
    assert means.take() == {"lm loss": 2.5, "bp steps": 2.5}
    means.add({"lm loss": torch.tensor(float("nan"))})
    assert str(means.take()) == "{'lm loss': nan}"


def test_only_what_the_table_names_is_silenced():
    assert all(remark.reason for remark in UNACTIONABLE)
    sources = {remark.source for remark in UNACTIONABLE} - {WARNINGS, "print"}
    before = {source: [*logging.getLogger(source).filters] for source in sources}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            silence_unactionable()
            warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
            warnings.warn("your gradients are wrong; Apex is not installed", stacklevel=1)
        assert [str(one.message) for one in caught] == ["your gradients are wrong; Apex is not installed"]
        logger = logging.getLogger("megatron.core.rerun_state_machine")
        assert not logger.filter(record("Result validation enabled"))
        assert logger.filter(record("Result validation failed"))
    finally:
        for source, filters in before.items():
            logging.getLogger(source).filters[:] = filters


def record(text):
    return logging.LogRecord("name", logging.WARNING, "file", 1, text, (), None)


def test_tools_show_no_info_of_other_libraries(monkeypatch):
    root = logging.Logger("root")
    monkeypatch.setattr(logging, "root", root)
    with warnings.catch_warnings():
        be_quiet()
    logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)], level=logging.INFO)  # as Megatron does
    assert root.level == logging.WARNING and [handler.stream for handler in root.handlers] == [sys.stderr]


def test_what_libraries_warn_of_is_shown_with_the_one_that_does(capsys):
    with Console(2, 3) as console:
        console.settle(None, verbose=False)
        logging.getLogger("megatron.core.writer").error("worker 0 failed\nin its second line")
        logging.getLogger("megatron.core.writer").info("all is well")
    assert capsys.readouterr().out == "rank 2: ERROR:megatron.core.writer:worker 0 failed\nin its second line\n"
