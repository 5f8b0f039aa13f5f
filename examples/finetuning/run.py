"""Teach the demo's model a new kind of question without forgetting the old ones: chats, `--finetune`, early stopping.

It needs the demo's results (`make demo`): checkpoints, tokenizer and questions. Some of the demo's own training
questions are mixed into the new chats; without them (--old-questions 0) the model forgets the old kinds.
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it can be run by path

from hrm_megatron.program import listen, one_line  # noqa: E402

if __name__ == "__main__":
    listen()

from examples.demo.commands import CommandFailed, flags, python, run  # noqa: E402
from examples.demo.progress import minutes, training_progress  # noqa: E402
from examples.finetuning.chats import Row, questions_of, write_chats  # noqa: E402
from hrm_megatron.checkpoint.iterations import folder_name  # noqa: E402
from hrm_megatron.config import ConfigError  # noqa: E402
from hrm_megatron.data.tokenizer import TextTokenizer  # noqa: E402

RANKS = 2  # data parallel, one core each
ROWS_PER_STEP = 8
SHOWN_QUESTIONS = 5
PROMISED_NEW, PROMISED_FALL = 0.9, 0.05
OWN_LINES = ("fine-tuning: ", "early stopping: ")
MARKER = ".made-by-finetuning"
STORES = ("train", "held_out", "old")  # the last only if old questions are mixed in
RESULTS = ("questions", "stores", "checkpoints", "commands.log")


class Failed(Exception):
    """The example misses the figures it promises; the message is one line."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the example."""

    train_chats: int
    held_out_chats: int
    test_chats: int
    old_questions: int
    train_iters: int
    eval_interval: int
    patience: int


# The reference's rate is for a billion parameters; this one is for a million, and for about a hundred steps.
LR = 1e-3
FULL = Scale(8000, 300, 300, 3500, train_iters=140, eval_interval=20, patience=2)
QUICK = Scale(60, 20, 10, 60, train_iters=4, eval_interval=1, patience=4)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the two ranks share the cores
    scale = QUICK if args.quick else FULL
    return one_line(lambda: example(args.demo, args.output, scale, args.old_questions, judged=not args.quick),
                    (CommandFailed, Failed))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), metavar="DIR",
                        help="what the demo left (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/finetuning"), metavar="DIR",
                        help="folder for the results; those of an earlier run are replaced (default: %(default)s)")
    parser.add_argument("--old-questions", type=int, metavar="N",
                        help=f"of the demo's training questions, to mix in (default: {FULL.old_questions})")
    parser.add_argument("--quick", action="store_true",
                        help="a few chats and steps, to see whether everything runs; learns nothing, so not judged")
    return parser.parse_args(arguments)


def example(demo: Path, folder: Path, scale: Scale, old_questions: int | None, judged: bool) -> None:
    """Run all steps and print the results."""
    began = time.monotonic()
    if old_questions is not None and old_questions < 0:
        raise ConfigError(f"--old-questions {old_questions}: must be at least 0")
    wanted = scale.old_questions if old_questions is None else old_questions
    prepare(demo, folder)
    log, tokenizer = folder / "commands.log", TextTokenizer(demo / "tokenizer")
    counts = {"train": scale.train_chats, "held_out": scale.held_out_chats, "test": scale.test_chats}
    new = questions_of(write_chats(folder / "questions", counts)["test"])
    old = read_rows(demo / "questions" / "test.jsonl")
    with open(demo / "questions" / "train.jsonl", encoding="utf-8") as lines:
        mixed_in = [*itertools.islice(lines, wanted)]
    (folder / "questions" / "old.jsonl").write_text("".join(mixed_in))
    print(f"{scale.train_chats:,} chats of a new kind and {len(mixed_in):,} of the demo's training questions; "
          f"{len(new)} new and {len(old)} old questions to test with, none of them trained on", flush=True)
    names = STORES if wanted else STORES[:-1]
    for name in names:
        run(python(tool("preprocess_data.py"), "--input", folder / "questions" / f"{name}.jsonl", "--output-prefix",
                   folder / "stores" / name, "--tokenizer-model", demo / "tokenizer"), log)

    from examples.demo import answers

    def right_shares(checkpoint: Path) -> list[float]:
        found = [answers.of_checkpoint(checkpoint, tokenizer, rows) for rows in (new, old)]
        for row, answer in itertools.islice(zip(new, found[0], strict=True), SHOWN_QUESTIONS):
            asked = " / ".join(row["instruction"].split("\n\n"))
            print(f"  {asked}  {answer.encode('unicode_escape').decode('ascii')}", flush=True)
        return [answers.right_share(answer, rows) for answer, rows in zip(found, (new, old), strict=True)]

    print("\nThe demo's model answers (EMA of its weights):", flush=True)
    before = right_shares(demo / "checkpoints")
    print("\nFine-tuning:", flush=True)
    training_began = time.monotonic()
    finetune(demo, folder, scale, names, log)
    training_seconds = time.monotonic() - training_began
    best = json.loads((folder / "checkpoints" / "early_stopping.json").read_text())["best_iteration"]
    print(f"\nThe best iteration, {best}, answers:", flush=True)
    after = right_shares(folder / "checkpoints" / folder_name(best))

    print(f"\nRight answers          before    after\n  new kind ({len(new):4})    {before[0]:6.1%}   {after[0]:6.1%}\n"
          f"  old kinds ({len(old):4})   {before[1]:6.1%}   {after[1]:6.1%}\n"
          f"Time: {minutes(time.monotonic() - began)}, of which training {minutes(training_seconds)}; made in {folder}")
    if judged and old_questions != 0:
        judge(before, after)


def judge(before: Sequence[float], after: Sequence[float]) -> None:
    """Raise Failed for figures below what is promised; each pair is (new kind, old kinds)."""
    if after[0] < PROMISED_NEW or before[1] - after[1] > PROMISED_FALL:
        raise Failed(f"{after[0]:.1%} of the new kind right, old kinds from {before[1]:.1%} to {after[1]:.1%}; "
                     f"promised are {PROMISED_NEW:.0%}, and a fall of at most {100 * PROMISED_FALL:.0f} points")


def prepare(demo: Path, folder: Path) -> None:
    """Create the folder, removing the results of an earlier run; refuse to replace files that are not from this
    example."""
    for name in ("checkpoints", "tokenizer", "questions/train.jsonl", "questions/test.jsonl"):
        if not (demo / name).exists():
            raise ConfigError(f"--demo {demo}: no {name} in it; run `make demo`, or give the folder of one")
    taken = [folder / name for name in RESULTS if (folder / name).exists()]
    if taken and not (folder / MARKER).exists():
        raise ConfigError(f"--output {folder}: {taken[0]} is not of this example; choose another folder")
    for path in taken:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def finetune(demo: Path, folder: Path, scale: Scale, names: Sequence[str], log: Path) -> None:
    stores = [folder / "stores" / name for name in names if name != "held_out"]
    run(python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m",
               "hrm_megatron.pretrain", "--finetune",
               *flags(pretrained_checkpoint=demo / "checkpoints", save=folder / "checkpoints"),
               "--train-data-path", *stores,
               *flags(valid_data_path=folder / "stores" / "held_out", tokenizer_model=demo / "tokenizer",
                      global_batch_size=ROWS_PER_STEP, micro_batch_size=ROWS_PER_STEP // RANKS,
                      train_iters=scale.train_iters, lr=LR, ema_decay=0.95, eval_interval=scale.eval_interval,
                      early_stopping=scale.patience, save_interval=scale.train_iters,
                      save_retain_interval=scale.train_iters, log_interval=10),
               "--full-validation"), log, progress)


def progress(line: str) -> str | None:
    """Return lines about training progress, the starting checkpoint and the best iteration; drop others."""
    return line.rstrip() if line.startswith(OWN_LINES) else training_progress(line)


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tool(name: str) -> str:
    """Return the relative path of a program in tools/."""
    return os.path.relpath(ROOT / "tools" / name)


if __name__ == "__main__":
    sys.exit(main())
