"""Inspect an indexed dataset: print a report, or show one packed row as the model sees it."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hrm_megatron.program import check_outputs, listen, one_line, whole_file

if __name__ == "__main__":
    listen()

from hrm_megatron.config import ConfigError, refuse_beside
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.report import markdown, report_on
from hrm_megatron.data.sampling_rules import read_rules
from hrm_megatron.data.write_report import WITHOUT_PICTURE, can_draw, write_report


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="what --output-prefix was")
    parser.add_argument("--seq-length", type=int, metavar="POSITIONS", help="pack rows of this length, as training")
    parser.add_argument("--seed", type=int, default=1234, help="of the packing, as in training (default: %(default)s)")
    parser.add_argument("--sampling-rules", metavar="FILE", help="YAML rules, as in training; with --epochs")
    parser.add_argument("--epochs", type=int, default=0, metavar="N",
                        help="say which share of each source N epochs show; with --seq-length")
    parser.add_argument("--verify", action="store_true", help="read all files and hold them against their checksums")
    parser.add_argument("--row", type=int, metavar="K",
                        help="instead of a report, show row K of epoch 0 over all examples: its tokens, labels, "
                             "borders and mask; with --seq-length and --tokenizer-model")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="of the dataset, to show tokens as text")
    parser.add_argument("--picture", type=Path, metavar="FILE",
                        help="where the picture of a row goes (default: PREFIX.rowK.png)")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    if args.seq_length is not None and args.seq_length < 1:
        raise ConfigError(f"--seq-length {args.seq_length}: must be at least 1")
    for flag, value in (("--epochs", args.epochs), ("--seed", args.seed)):
        if value < 0:
            raise ConfigError(f"{flag} {value}: must be at least 0")
    store = IndexedExamples(args.prefix)
    if args.verify:
        blocks = store.blocks()
        for block in blocks:
            block.verify()
        print(f"{args.prefix}: {sum(block.length for block in blocks):,} bytes are what was written")
    if args.row is not None:
        check_outputs({"--picture": args.picture}, (".png", ".pdf", ".svg"))
        refuse_beside(f"--row {args.row}", {"--sampling-rules": args.sampling_rules, "--epochs": args.epochs})
        show_row(args, store)
        return
    for flag, given in (("--picture", args.picture), ("--tokenizer-model", args.tokenizer_model)):
        if given is not None:
            raise ConfigError(f"{flag}: only --row K reads it; leave it out")
    rules = read_rules(args.sampling_rules) if args.sampling_rules else None
    report = report_on(store, args.seq_length, rules=rules, epochs=args.epochs, seed=args.seed)
    print(markdown(report), end="")
    print("\n".join(write_report(report)))


def show_row(args: argparse.Namespace, store: IndexedExamples) -> None:
    """Print row K and draw its attention mask."""
    if args.seq_length is None or args.tokenizer_model is None:
        raise ConfigError("--row: give --seq-length and --tokenizer-model too")
    from hrm_megatron.attention.prefix_lm import PrefixSequences
    from hrm_megatron.attention.rotary import Rotation
    from hrm_megatron.data.batch import PackedBatch
    from hrm_megatron.data.dataset import PackedRows
    from hrm_megatron.data.row_view import view_row
    from hrm_megatron.data.tokenizer import TextTokenizer

    tokenizer = TextTokenizer(args.tokenizer_model)
    store.check_tokenizer(tokenizer.fingerprint)
    rows = PackedRows(store, args.seq_length, args.seed, num_rows=1, fixed=True)
    if not 0 <= args.row < rows.rows_per_epoch:
        raise ConfigError(f"--row {args.row}: there are {rows.rows_per_epoch} rows of {args.seq_length}, from 0")
    rows.num_rows = rows.rows_per_epoch
    batch = PackedBatch.from_row(rows[args.row])
    view = view_row(batch, tokenizer, [store.example_name(int(i)) for i in rows.plan.locate(args.row).example_ids])
    print(*view.lines(), sep="\n")
    if not can_draw():
        print(WITHOUT_PICTURE)
        return
    from hrm_megatron.data.report_picture import draw_row, shown_positions

    pairs = batch.lengths[0]
    sequences = PrefixSequences(batch.lengths, Rotation.of(batch.position_ids, 2, 1e4),
                                shown_positions(args.seq_length, pairs))
    path = args.picture or Path(f"{args.prefix}.row{args.row}.png")
    with whole_file(path) as drawn:
        draw_row(view.texts, view.labels, pairs, sequences.dense_mask(0).numpy(),
                 f"{Path(args.prefix).name}, row {args.row}: {len(pairs)} examples in {args.seq_length} positions",
                 drawn)
    print(f"picture: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return one_line(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
