"""The demo end to end at a tiny scale, and its parts: commands, progress, the folder, the promise, the picture."""
from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("mathematics_dataset")
pytest.importorskip("matplotlib")
from examples.demo.commands import CommandFailed, run, shown
from examples.demo.picture import draw
from examples.demo.progress import training_progress
from examples.demo.run import MARKER, QUICK, RESULTS, DemoFailed, judge, prepare
from hrm_megatron.monitoring.scalars import Log
from tests.modes import wrong_modes
from tests.warm import Commands

ROOT = Path(__file__).resolve().parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
UMASK = 0o027  # of a cluster whose groups share
SLEEP = "import time; time.sleep(60)"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> tuple[Path, str]:
    """The folder and the printed text of a quick demo."""
    folder: Path = tmp_path_factory.mktemp("runs") / "demo"
    done = subprocess.run([commands.python, "examples/demo/run.py", "--quick", "--output", str(folder)], cwd=ROOT,
                          env={**os.environ, **commands.environment}, capture_output=True, text=True, umask=UMASK)
    assert done.returncode == 0 and "INFO" not in done.stderr, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.timeout(600)
def test_the_demo_leaves_all_that_it_lists(demo):
    folder, printed = demo
    assert {path.name for path in folder.iterdir()} == {*RESULTS, MARKER}
    assert all(re.search(rf"^  {re.escape(name)} ", printed, re.M) for name in RESULTS)
    assert sorted(path.name for path in (folder / "checkpoints").glob("iter_*")) == ["iter_0000003", "iter_0000005"]


def test_all_of_it_is_as_open_as_the_umask_says(demo):
    assert not wrong_modes(demo[0], UMASK)


def test_no_test_question_was_in_training(demo):
    files = {name: (demo[0] / "questions" / f"{name}.jsonl").read_text() for name in ("train", "valid", "test")}
    texts = {name: {json.loads(line)["instruction"] for line in text.splitlines()} for name, text in files.items()}
    assert [len(texts[name]) for name in texts] == [QUICK.train_questions, QUICK.valid_questions, QUICK.test_questions]
    assert not texts["train"] & texts["test"] and not texts["valid"] & texts["test"]


def test_the_log_has_losses_on_both_sides_of_the_resume(demo):
    curves = Log(demo[0] / "tensorboard").curves()
    steps, losses, _ = curves["lm loss"]
    assert steps == [1, 2, 3, 4, 5] and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert curves["lm loss validation"][0] == curves["exact accuracy validation"][0] == [2, 4, 5]
    assert len(list((demo[0] / "tensorboard").glob("events*"))) == 2  # one per command


@pytest.mark.timeout(600)
def test_the_fine_tuning_example_goes_on_from_a_demo(demo, commands, tmp_path):
    command = [commands.python, "examples/finetuning/run.py", "--quick", "--demo", str(demo[0]), "--output",
               str(tmp_path / "tuned")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **commands.environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"fine-tuning: begins from {demo[0]}/checkpoints/iter_0000005: the EMA of its weights" in done.stdout
    best = json.loads((tmp_path / "tuned" / "checkpoints" / "early_stopping.json").read_text())["best_iteration"]
    assert f"early stopping: the best is iteration {best} with " in done.stdout, done.stdout
    assert re.search(r"new kind \( +\d+\) +0\.0% +\d+\.\d%\n  old kinds \(  40\) ", done.stdout)


def test_the_picture_is_one(demo):
    from matplotlib.image import imread

    image = imread(demo[0] / "training.png")
    assert image.shape[0] > 400 and image.shape[1] > 600
    assert image.std() > 0.05  # not blank


def test_the_export_loads_in_transformers(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo[0] / "hf")
    prompt = tokenizer("What is the tens digit of 57?", return_tensors="pt")
    logits = AutoModelForCausalLM.from_pretrained(demo[0] / "hf")(**prompt).logits
    assert logits.shape[1] == prompt["input_ids"].shape[1] and logits.isfinite().all()


def test_the_summary_has_the_accuracies_and_every_command(demo):
    folder, printed = demo
    for name in ("before training", "best constant answer per module", "after training"):
        assert re.search(rf"^  {name} +\d+\.\d%$", printed, re.M), printed
    assert "the Megatron checkpoint gives the same ten answers" in printed
    assert len(re.findall(r"^  (?:right|wrong)  ", printed, re.M)) == 10
    logged = (folder / "commands.log").read_text()
    commands = [line for line in logged.splitlines() if line.startswith("$ ")]
    assert len(commands) == 6
    flat = printed.replace(" \\\n     ", "").replace("    --", "--")
    for command in commands:
        assert " ".join(command.split()) in " ".join(flat.split())
    assert re.search(r"^  step 3/5  loss +\d\.\d{4}  exact .* left$", printed, re.M)
    assert f"checkpoint: goes on after step 3, loaded from {folder / 'checkpoints'}" in printed
    assert "INFO" not in printed


def test_a_folder_of_others_is_refused_in_one_line(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious").touch()
    done = subprocess.run([sys.executable, ROOT / "examples/demo/run.py", "--output", tmp_path], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: --output {tmp_path}: {tmp_path / 'hf'} is not of this demo; choose another folder\n"
    assert (tmp_path / "hf" / "precious").exists()


def test_only_the_results_of_an_earlier_demo_are_replaced(tmp_path):
    own = tmp_path / "new" / "demo"
    prepare(own)
    (own / "stores").mkdir()
    (own / "training.png").touch()
    (own / "notes.txt").touch()
    prepare(own)
    assert {path.name for path in own.iterdir()} == {MARKER, "notes.txt"}


def test_the_promise_is_40_percent_and_twice_the_constant():
    judge(0.45, constant=0.22)
    for after, constant in ((0.39, 0.1), (0.45, 0.23)):
        with pytest.raises(DemoFailed, match=f"{after:.1%} right after training"):
            judge(after, constant)


def test_a_command_is_shown_so_that_a_shell_takes_it(tmp_path, capfd):
    words = ["printf", "%s|", *(word for i in range(12) for word in (f"--flag-{i}", "a b")), "it's"]
    run(words, tmp_path / "log")
    text = shown(words)
    assert len(text.splitlines()) == 2
    assert subprocess.run(["sh", "-c", text], capture_output=True, text=True).stdout \
        == (tmp_path / "log").read_text().split("\n", 1)[1] == "|".join(words[2:]) + "|"


def test_a_failed_command_tells_its_last_lines_and_where_the_others_are(tmp_path, capfd):
    program = ("import sys\nfor i in range(100): print('line', i)\n"
               "print('E0102 x.py:986] failed (exitcode: 2)')\nprint('Root Cause: see elsewhere')\nsys.exit(3)")
    with pytest.raises(CommandFailed, match="status 3") as caught:
        run([sys.executable, "-c", program], tmp_path / "log", lambda line: "seen" if "line 7\n" == line else None)
    assert "line 99\n" in str(caught.value) and "line 79\n" not in str(caught.value)
    assert "Root Cause" not in str(caught.value)
    assert str(tmp_path / "log") in str(caught.value)
    assert "line 79\nline 80\n" in (tmp_path / "log").read_text()
    assert capfd.readouterr().out.count("  seen\n") == 1


# As torchrun does it: a session of its own for each rank.
LAUNCHER = ("import subprocess, sys, time\n"
            f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)\n"
            f"print(child.pid, flush=True)\n{SLEEP}")


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# Shells start background jobs with SIGINT ignored, and what they start inherits that.
@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_DFL, signal.SIG_IGN],
                         ids=["foreground", "default", "ignored"])
def test_an_interrupt_ends_a_command_and_what_it_started(tmp_path, inherited):
    pids = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, inherited)
    try:
        with pytest.raises(KeyboardInterrupt):
            run([sys.executable, "-c", LAUNCHER], tmp_path / "log", interrupt)
        assert signal.getsignal(signal.SIGINT) is inherited
    finally:
        signal.signal(signal.SIGINT, before)
    assert has_ended(pids[0])


def test_a_demo_in_the_background_ends_on_sigterm_alone(tmp_path):
    answering = f"import os, signal\nsignal.signal(signal.SIGUSR1, lambda *_: print(-1, flush=True))\n{LAUNCHER}"
    answering = answering.replace("print(child.pid,", "print(os.getpid(), child.pid,")
    program = ("import sys\nfrom pathlib import Path\nfrom examples.demo import commands, run\nrun.listen()\n"
               f"command = [sys.executable, '-c', {answering!r}]\n"
               "run.demo = lambda *_, **__: commands.run(command, Path('log'), lambda line: f'said {line}')\n"
               "sys.exit(run.main(['--output', 'out']))")
    # As `nohup python ... &` in a script.
    with subprocess.Popen(["sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh", sys.executable, "-c", program],
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout
        said = (list(map(int, line.split()[1:])) for line in process.stdout if line.startswith("  said "))
        pids = next(said)
        for number in (signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
            os.kill(pids[0], signal.SIGUSR1)
            assert next(said, None) == [-1], number
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert all(map(has_ended, pids))


def test_steps_validations_saves_and_the_start_are_passed_on():
    shown = ["step    2/5  loss  4.9690  exact   0.4%", "step 2/5  validation: loss 3.3650", "checkpoint: new weights",
             "step 3/5  saved in 1s: runs/demo/checkpoints/iter_0000003"]
    hidden = ["layout: 2 ranks", "  stage 0: 2 layers", "Evaluating iter 1/5", "INFO:httpx:step 3/5"]
    assert [training_progress(f"{line}\n") for line in shown + hidden] == shown + [None] * len(hidden)


def test_the_picture_needs_only_a_log(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for steps in (range(1, 6), range(4, 9)):  # a resume writes some steps again
        with SummaryWriter(tmp_path / "log") as writer:
            for step in steps:
                for name in ("lm loss", "exact accuracy", "lm loss validation", "exact accuracy validation"):
                    writer.add_scalar(name, step / 10, step)
    draw(tmp_path / "log", 4, 0.2, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG_SIGNATURE)
