"""Train a byte-level BPE tokenizer on files of examples or documents."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.data.example import BadRows
from hrm_megatron.data.inputs import add_input_flags, inputs_of
from hrm_megatron.data.progress import show_log
from hrm_megatron.data.tokenizer_training import TEXTS_PER_CAPPED_ROW, learn_tokenizer


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_input_flags(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=65_536, help="entries at most (default: %(default)s)")
    parser.add_argument("--max-chars", type=int, default=10_000,
                        help="characters used of each instruction and response (default: %(default)s)")
    parser.add_argument("--max-per-file", type=int, metavar="ROWS",
                        help="rows per file and epoch that sampling will take: at most "
                             f"{TEXTS_PER_CAPPED_ROW} times as many texts are read of each file (default: all)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    existing.add_argument("--keep-same", action="store_true",
                          help="leave an existing tokenizer alone if it was made from the same files and settings; any "
                               "other is an error")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    bad_rows = BadRows(args.on_bad_row == "skip")
    paths, rows = inputs_of(args, one_shape=False)
    tokenizer = learn_tokenizer(paths, args.output, args.vocab_size, args.max_chars, args.overwrite, rows, bad_rows,
                                args.keep_same, args.max_per_file)
    if tokenizer is None:
        print(f"{args.output}: made from the same input before, kept")
    else:
        print(f"{args.output}: {tokenizer.vocab_size} entries", *bad_rows.lines(), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    show_log()
    return one_line(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
