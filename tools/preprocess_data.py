"""Turn files of examples or documents into a Megatron .bin/.idx that hrm_megatron.pretrain reads."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.data.inputs import add_input_flags, inputs_of
from hrm_megatron.data.preprocess import preprocess
from hrm_megatron.data.tokenizer import TextTokenizer


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_input_flags(parser)
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX",
                        help="PREFIX.bin, PREFIX.idx and PREFIX.json are written")
    parser.add_argument("--tokenizer-model", required=True, metavar="PATH", help="tokenizer folder or tokenizer.json")
    parser.add_argument("--workers", type=int, default=1, help="processes; they do not change the output")
    parser.add_argument("--context-size", type=int, default=4096, metavar="POSITIONS",
                        help="longer responses are truncated (default: %(default)s)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace an existing output")
    existing.add_argument("--keep-same", action="store_true",
                          help="leave an existing output alone if it was made from the same files and settings; any "
                               "other is an error")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    paths, rows = inputs_of(args)
    report = preprocess(paths, args.output_prefix, TextTokenizer(args.tokenizer_model), args.workers, rows,
                        args.context_size, args.on_bad_row == "skip", args.overwrite, keep_same=args.keep_same)
    if report is None:
        print(f"{args.output_prefix}: made from the same input before, kept")
    else:
        print(f"{args.output_prefix}: {report.summary()}", *report.lines(), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return one_line(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
