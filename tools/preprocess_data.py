"""Turn jsonl files of examples into a Megatron .bin/.idx that hrm_megatron.pretrain reads."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.data.engine import ENGINES
from hrm_megatron.data.inputs import add_input_flags, inputs_of
from hrm_megatron.data.lint import LINT
from hrm_megatron.data.preprocess import preprocess
from hrm_megatron.data.spelling import add_spelling_flags, chosen_spelling
from hrm_megatron.data.tokenizer import TextTokenizer, respelled, tokenizer_file


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_input_flags(parser)
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX",
                        help="PREFIX.bin, PREFIX.idx and PREFIX.json are written")
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
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace an existing output")
    existing.add_argument("--keep-same", action="store_true",
                          help="leave an existing output alone if it was made from the same files and settings; any "
                               "other is an error")
    return parser.parse_args(arguments)


def open_tokenizer(args: argparse.Namespace) -> TextTokenizer:
    """Open the tokenizer; one with another spelling is written beside the output, for what is trained on it."""
    path = args.tokenizer_model
    if spelling := chosen_spelling(args, tokenizer_file(path)):
        path = respelled(path, spelling, Path(f"{args.output_prefix}.tokenizer"), args.overwrite)
        print(f"{path}: the tokenizer as these flags spell; give it as --tokenizer-model from here on")
    return TextTokenizer(path, args.tokenizer_engine)


def run(args: argparse.Namespace) -> None:
    tokenizer = open_tokenizer(args)
    paths, rows = inputs_of(args, tokenizer.spelling.tags)
    report = preprocess(paths, args.output_prefix, tokenizer, args.workers, rows,
                        args.context_size, args.on_bad_row == "skip", args.overwrite, keep_same=args.keep_same,
                        lint=args.lint)
    if report is None:
        print(f"{args.output_prefix}: made from the same input before, kept")
    else:
        print(f"{args.output_prefix}: {report.summary()}", *report.lines(), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return one_line(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
