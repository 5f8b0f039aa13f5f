"""Train a byte-level BPE tokenizer on jsonl files of examples."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import find_inputs
from hrm_megatron.data.preprocess import learn_tokenizer


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, globs or folders of jsonl")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=65_536, help="entries at most (default: %(default)s)")
    parser.add_argument("--max-chars", type=int, default=10_000,
                        help="characters used of each instruction and response (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        tokenizer = learn_tokenizer(find_inputs(args.input), args.output, args.vocab_size, args.max_chars,
                                    args.overwrite)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {tokenizer.vocab_size} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
