"""Turn jsonl files of examples into a Megatron .bin/.idx that hrm_megatron.pretrain reads."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import FIELDS, find_inputs
from hrm_megatron.data.preprocess import preprocess
from hrm_megatron.data.tokenizer import TextTokenizer


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, globs or folders of jsonl")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX",
                        help="PREFIX.bin, PREFIX.idx and PREFIX.json are written")
    parser.add_argument("--tokenizer-model", required=True, metavar="PATH", help="tokenizer folder or tokenizer.json")
    parser.add_argument("--workers", type=int, default=1, help="processes; they do not change the output")
    parser.add_argument("--json-keys", nargs=3, default=FIELDS, metavar=("CONDITION", "INSTRUCTION", "RESPONSE"),
                        help="names of the fields in your rows (default: the names above in lower case)")
    parser.add_argument("--context-size", type=int, default=4096, metavar="POSITIONS",
                        help="longer responses are truncated (default: %(default)s)")
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error",
                        help="stop at a bad row, or count and leave it out (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        report = preprocess(find_inputs(args.input), args.output_prefix, TextTokenizer(args.tokenizer_model),
                            args.workers, args.json_keys, args.context_size, args.on_bad_row == "skip", args.overwrite)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output_prefix}: {report.summary()}")
    for line in report.skipped_lines():
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
