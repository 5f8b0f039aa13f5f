"""Tokenize files of examples or documents into shards of indexed datasets (.bin/.idx) that hrm_megatron.pretrain
reads."""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.config import ConfigError, refuse_beside
from hrm_megatron.data.dataset_folder import Task
from hrm_megatron.data.deduplicate import check_duckdb, deduplicate
from hrm_megatron.data.engine import ENGINES
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.inputs import add_input_flags, inputs_of
from hrm_megatron.data.kept_examples import forget_kept_of_another
from hrm_megatron.data.lint import LINT
from hrm_megatron.data.preprocess import preprocess
from hrm_megatron.data.progress import show_log
from hrm_megatron.data.report import report_on
from hrm_megatron.data.respelled import Respelled
from hrm_megatron.data.source_names import source_names
from hrm_megatron.data.spelling import add_spelling_flags, chosen_spelling
from hrm_megatron.data.tokenizer import TextTokenizer, tokenizer_file
from hrm_megatron.data.write_report import write_report


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_input_flags(parser)
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX",
                        help="PREFIX.json and the folder PREFIX.shards are written; where they are already there, only "
                             "what has changed is made, and shards of files that are no longer among --input go")
    parser.add_argument("--tokenizer-model", required=True, metavar="PATH", help="tokenizer folder or tokenizer.json")
    parser.add_argument("--tokenizer-engine", choices=ENGINES, default="auto",
                        help="gigatoken spells texts many times as fast, and tokenizers those for which it is not "
                             "proven to give the same ids; they do not change the output (default: %(default)s, "
                             "gigatoken where it is installed)")
    add_spelling_flags(parser)
    parser.add_argument("--lint", choices=LINT, default="warn",
                        help="report rows that silently ruin a model, refuse them, or do not look (default: "
                             "%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes; they do not change the output")
    parser.add_argument("--context-size", type=int, default=4096, metavar="POSITIONS",
                        help="longer responses are truncated (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true",
                        help="make all of it again, in place of a dataset of other settings or of other files")
    parser.add_argument("--deduplicate", action="store_true",
                        help="leave out of training what has the condition, instruction and response of an earlier "
                             "example; PREFIX.kept.npy says what is kept (needs duckdb)")
    shared = parser.add_mutually_exclusive_group()
    shared.add_argument("--shard", metavar="I/N",
                        help="as task I of N, from 0, that are given the same files: make the shards of this one's "
                             "share. The last to end completes the dataset")
    shared.add_argument("--merge", action="store_true",
                        help="complete the dataset from shards that are all there, and make none")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    if os.path.basename(args.output_prefix) in ("", os.curdir, os.pardir):
        raise ConfigError(f"--output-prefix {args.output_prefix!r}: ends without a name for the dataset's files; give "
                          "one, as in data/train")
    task = Task.of(args.shard) if args.shard else None
    if args.deduplicate:
        check_duckdb()
        refuse_beside("--deduplicate", {"--shard (give it with --merge)": args.shard})
    path = args.tokenizer_model
    spelling = chosen_spelling(args, tokenizer_file(path))
    if spelling is None:
        make(args, TextTokenizer(path, args.tokenizer_engine), task)
        return
    respelled = Respelled.of(path, spelling, Path(f"{args.output_prefix}.tokenizer"), args.overwrite)
    with tempfile.TemporaryDirectory() as aside:
        make(args, TextTokenizer(respelled.write_aside(Path(aside)), args.tokenizer_engine), task, respelled)


def make(args: argparse.Namespace, tokenizer: TextTokenizer, task: Task | None,
         respelled: Respelled | None = None) -> None:
    """Make the dataset, or a task's share of it, and print a report; `respelled` is the tokenizer to write beside
    it."""
    paths, rows = inputs_of(args, tokenizer.spelling.tags)
    report = preprocess(paths, args.output_prefix, tokenizer, args.workers, rows,
                        args.context_size, args.on_bad_row == "skip", args.overwrite,
                        names=source_names(args.input, paths), task=task, merge=args.merge, lint=args.lint,
                        beside=respelled.write if respelled else lambda: None)
    if report is None:
        print(f"{args.output_prefix}: the share of --shard {args.shard} is done; others are not")
        return
    if respelled:
        print(f"{respelled.folder}: the tokenizer as these flags spell; give it as --tokenizer-model from here on")
    print(f"{args.output_prefix}: {report.summary()}", *report.lines(), *report.work(), sep="\n")
    store = IndexedExamples(args.output_prefix)
    if args.deduplicate:
        print(f"{args.output_prefix}: {deduplicate(store, args.workers)}")
    elif forget_kept_of_another(store):
        print(f"{args.output_prefix}: has changed, and its duplicates are not left out any more; --deduplicate "
              "finds them again")
    shown = report_on(IndexedExamples(args.output_prefix), args.context_size, report)
    print("\n".join(write_report(shown)))


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    show_log()
    return one_line(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
