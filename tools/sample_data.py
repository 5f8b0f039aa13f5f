"""Sample HRM-Text's tokenized folders by sampling rules into the `sampled` folder that --sampled-data-path reads."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.data.sampler import sample
from hrm_megatron.data.sampling_rules import read_rules


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input-tokenized", required=True, metavar="DIR",
                        help="folder of tokenizer_info.json and one folder per source file")
    parser.add_argument("--sampling-rules", required=True, metavar="FILE", help="YAML list of rules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--context-tokens", type=int, default=4097, metavar="TOKENS",
                        help="of prefix and response together, one more than a row has positions (default: "
                             "%(default)s)")
    parser.add_argument("--sampled-output", required=True, metavar="DIR", help="a new folder")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    sources = sample(args.input_tokenized, read_rules(args.sampling_rules), args.seed, args.epochs,
                     args.context_tokens, args.sampled_output)
    for source in sources:
        print(f"{source.name}: {source.rows} rows fit, {source.per_epoch} an epoch, {source.drawn} in all")
    print(f"{args.sampled_output}: {args.epochs} epochs of {sum(source.per_epoch for source in sources)} examples")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return one_line(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
