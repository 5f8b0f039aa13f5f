"""Show the whole workflow on a machine without a GPU: from arithmetic questions to a trained and exported HRM.

It makes questions, a tokenizer and indexed datasets, trains with a stop and a resume in the middle, answers unseen
questions before and after, and answers some with the export in plain transformers. It prints each command line.
"""
from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it can be run by path, as `make demo` does

from hrm_megatron.program import Stopped, listen, one_line  # noqa: E402

if __name__ == "__main__":
    listen()

# No torch or Megatron at module level: the processes that make the questions import this file again.
from examples.demo.commands import CommandFailed, flags, python, run, shown  # noqa: E402
from examples.demo.progress import minutes, training_progress  # noqa: E402
from examples.demo.questions import Row, constant_answer_accuracy, write_questions  # noqa: E402
from hrm_megatron.config import Architecture, ConfigError  # noqa: E402
from hrm_megatron.data.tokenizer import TextTokenizer  # noqa: E402

HIDDEN_SIZE = 128
VOCAB_SIZE = 512  # at most; these questions give about 400
RANKS = 2  # data parallel, one core each
# Packing groups examples of similar length: many short rows give a more balanced step than a few long ones.
ROWS_PER_STEP, ROW_TOKENS = 8, 256
SEED = 1234
SHOWN_QUESTIONS = 10
PROMISED_ACCURACY, PROMISED_TIMES_CONSTANT = 0.4, 2.0
STEPS = 7  # sections of the demo

# What the demo writes to its folder. Nothing else in it is touched.
RESULTS = {
    "questions": "train, validation and test questions (jsonl)",
    "tokenizer": "the tokenizer",
    "stores": "the questions as token ids",
    "checkpoints": "Megatron checkpoints: of the stop and of the end",
    "tensorboard": "losses, accuracies, rates, tokens/s of every step",
    "hf": "the trained model for transformers",
    "training.png": "the curves as a picture",
    "commands.log": "the whole output of every command",
}
MARKER = ".made-by-demo"


class DemoFailed(Exception):
    """The demo misses the figures it promises; the message is one line."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the demo; `eval_rows` is the number of packed rows that hold all validation questions."""

    train_questions: int
    valid_questions: int
    test_questions: int
    train_iters: int
    stop_after: int
    eval_interval: int
    eval_rows: int
    log_interval: int


# 40,300 questions fill the rows of 350 steps once. The last step is not a multiple of the evaluation interval, since
# Megatron evaluates there anyway.
FULL = Scale(40_300, 562, 500, train_iters=350, stop_after=175, eval_interval=60, eval_rows=40, log_interval=10)
QUICK = Scale(300, 110, 40, train_iters=5, stop_after=3, eval_interval=2, eval_rows=8, log_interval=1)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    # Before torch is imported. The two ranks share the cores; more threads than cores cost more than they gain.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        return one_line(lambda: demo(args.output, QUICK if args.quick else FULL, judged=not args.quick),
                        (CommandFailed, DemoFailed))
    except Stopped:
        print(f"\n{args.output} keeps what is there until the next run", file=sys.stderr)
        raise


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR",
                        help="folder for the results; those of an earlier demo are replaced (default: %(default)s)")
    parser.add_argument("--quick", action="store_true",
                        help="a few questions and steps, to see in a minute whether everything runs; learns nothing, "
                             "so that the accuracy is not judged")
    return parser.parse_args(arguments)


def demo(folder: Path, scale: Scale, judged: bool) -> None:
    """Run all steps and print the results."""
    clock = Clock()
    prepare(folder)
    log = folder / "commands.log"

    clock.heading("Questions of DeepMind's mathematics_dataset (about 20 s)")
    files = write_questions(folder / "questions", scale.train_questions, scale.valid_questions, scale.test_questions)
    train, test = files["train"], files["test"]
    constant = constant_answer_accuracy(train, test)
    print(f"  {len(train):,} for training, {len(files['valid']):,} for validation, {len(test):,} for the test; none "
          f"occurs twice\n  the best constant answer per module is right for {constant:.1%} of the test")

    clock.heading("A tokenizer, and the questions as token ids")
    tokenizer = make_stores(folder, log)
    architecture = Architecture(num_layers=2, hidden_size=HIDDEN_SIZE, num_attention_heads=4,
                                ffn_hidden_size=2 * HIDDEN_SIZE, vocab_size=tokenizer.vocab_size)

    clock.heading("The untrained model answers the test (about 20 s)")
    from examples.demo import answers
    before = answers.right_share(answers.of_untrained(architecture, SEED, tokenizer, test), test)
    print(f"  {before:.1%} of {len(test)} right")

    clock.heading(f"Training: {scale.train_iters} steps on {RANKS} ranks, stopped after {scale.stop_after} and resumed")
    training_seconds = train_with_a_stop(folder, scale, architecture, log)

    clock.heading("The trained model (EMA of its weights) answers the test")
    ours = answers.of_checkpoint(folder / "checkpoints", tokenizer, test)
    after = answers.right_share(ours, test)
    print(f"  {after:.1%} of {len(test)} right")

    clock.heading("Export to Hugging Face; plain transformers answers ten of the test")
    run(python(tool("convert_checkpoint.py"), "--load", folder / "checkpoints", "--load-format", "megatron",
               "--save", folder / "hf", "--save-format", "hf", "--tokenizer-model", folder / "tokenizer"), log)
    exported = answers.of_export(folder / "hf", test[:SHOWN_QUESTIONS], answers.longest_answer(tokenizer, test))
    show_answers(test[:SHOWN_QUESTIONS], exported)
    if exported != ours[:SHOWN_QUESTIONS]:
        raise DemoFailed(f"transformers does not answer as the Megatron checkpoint does: {ours[:SHOWN_QUESTIONS]}")
    print("  the Megatron checkpoint gives the same ten answers")

    clock.heading("A picture of the run, from its TensorBoard log")
    from examples.demo.picture import draw
    draw(folder / "tensorboard", scale.stop_after, constant, folder / "training.png")
    print(f"  {folder / 'training.png'}")

    summarize(folder, len(test), before, constant, after, clock, training_seconds)
    if judged:
        judge(after, constant)


def judge(after: float, constant: float) -> None:
    """Raise DemoFailed for an accuracy below what the demo promises."""
    if after < max(PROMISED_ACCURACY, PROMISED_TIMES_CONSTANT * constant):
        raise DemoFailed(f"{after:.1%} right after training; the demo promises at least {PROMISED_ACCURACY:.0%} and "
                         f"{PROMISED_TIMES_CONSTANT:g} times the {constant:.1%} of the best constant answer")


class Clock:
    """Prints numbered headings with the time since the start."""

    def __init__(self) -> None:
        self.started, self.step = time.monotonic(), 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def heading(self, text: str) -> None:
        self.step += 1
        print(f"\n[{self.step}/{STEPS}] {minutes(self.seconds)}  {text}", flush=True)


def prepare(folder: Path) -> None:
    """Create the folder, removing the results of an earlier demo; refuse to replace files that no demo has made."""
    for package in ("matplotlib", "mathematics_dataset"):
        if find_spec(package) is None:
            raise ConfigError(f"the package {package} is missing; run `make setup`, or pip install -e '.[demo]'")
    taken = [folder / name for name in RESULTS if (folder / name).exists()]
    if taken and not (folder / MARKER).exists():
        raise ConfigError(f"--output {folder}: {taken[0]} is not of this demo; choose another folder")
    if taken:
        print(f"{folder}: replacing the results of an earlier demo, leaving other files alone")
    for path in taken:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def make_stores(folder: Path, log: Path) -> TextTokenizer:
    questions, tokenizer = folder / "questions", folder / "tokenizer"
    run(python(tool("train_tokenizer.py"), "--input", questions / "train.jsonl", "--output", tokenizer,
               "--vocab-size", str(VOCAB_SIZE)), log, watch=str.rstrip)
    for name in ("train", "valid"):
        run(python(tool("preprocess_data.py"), "--input", questions / f"{name}.jsonl", "--output-prefix",
                   folder / "stores" / name, "--tokenizer-model", tokenizer), log, watch=str.rstrip)
    return TextTokenizer(tokenizer)


def train_with_a_stop(folder: Path, scale: Scale, architecture: Architecture, log: Path) -> float:
    """Train with two command lines, the second resuming from the first's checkpoint; return the seconds taken."""
    checkpoints = folder / "checkpoints"
    command = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", "hrm_megatron.pretrain",
        *flags(train_data_path=folder / "stores" / "train", valid_data_path=folder / "stores" / "valid",
               tokenizer_model=folder / "tokenizer", num_layers=architecture.num_layers,
               hidden_size=architecture.hidden_size, ffn_hidden_size=architecture.ffn_hidden_size,
               num_attention_heads=architecture.num_attention_heads,
               seq_length=ROW_TOKENS, micro_batch_size=ROWS_PER_STEP // RANKS, global_batch_size=ROWS_PER_STEP,
               train_iters=scale.train_iters, seed=SEED,
               lr=2e-3, min_lr=2e-4, lr_warmup_fraction=0.05, ema_decay=0.99,
               eval_interval=scale.eval_interval, eval_iters=scale.eval_rows // ROWS_PER_STEP,
               log_interval=scale.log_interval, tensorboard_dir=folder / "tensorboard", save=checkpoints,
               save_interval=scale.train_iters))
    started = time.monotonic()
    print("  (the first step comes about ten seconds after a start)")
    run([*command, *flags(exit_interval=scale.stop_after)], log, training_progress)
    print(f"  stopped after step {scale.stop_after}; the same command, with --load, goes on")
    run([*command, *flags(load=checkpoints)], log, training_progress)
    return time.monotonic() - started


def tool(name: str) -> str:
    """Return the relative path of a program in tools/."""
    return os.path.relpath(ROOT / "tools" / name)


def show_answers(rows: Sequence[Row], answers: Sequence[str]) -> None:
    width = max(len(row["instruction"]) for row in rows)
    for row, answer in zip(rows, answers, strict=True):
        # Escaped: an untrained model's output may contain control characters.
        said = f"{row['instruction']:{width}}  {answer.encode('unicode_escape').decode('ascii')}"
        print(f"  right  {said}" if answer == row["response"] else f"  wrong  {said}, not {row['response']}")


def summarize(folder: Path, count: int, before: float, constant: float, after: float, clock: Clock,
              training_seconds: float) -> None:
    """Print the figures, the files written, and what to try next."""
    print(f"\nRight answers to {count} unseen questions\n"
          f"  before training                  {before:6.1%}\n"
          f"  best constant answer per module  {constant:6.1%}\n"
          f"  after training                   {after:6.1%}\n"
          f"Time: {minutes(clock.seconds)}, of which training {minutes(training_seconds)}\n\nMade in {folder}:")
    for name, content in RESULTS.items():
        print(f"  {name:13} {content}")
    ask = python(tool("generate.py"), "--load", folder / "checkpoints", "--tokenizer-model", folder / "tokenizer",
                 "--prompt", "What is the tens digit of 7543?")
    see = python("-m", "tensorboard.main", "--logdir", folder / "tensorboard")
    print(f"\nNext\n  ask it something:\n    {shown(ask)}\n  see the run in a browser:\n    {shown(see)}\n"
          f"  train on your own data:\n    DATA=my.jsonl {os.path.relpath(ROOT / 'examples/own_data.sh')}")


if __name__ == "__main__":
    sys.exit(main())
