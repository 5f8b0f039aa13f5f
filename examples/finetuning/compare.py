"""Compare ways of fine-tuning with equal numbers of updates: one learning rate, a rate per stack, LoRA.

A stack of an HRM runs several times in a step, so its gradient is a sum over ticks. Does that call for a rate divided
by the number of ticks, or for small adapters instead of all weights? Every way trains on the same rows, of new
questions and some old ones, with the same optimizer, at several rates. Prints a Markdown table of the share of exactly
right held-out answers, of the new kind and of the old ones.

    python examples/finetuning/compare.py --load runs/demo/checkpoints --train runs/finetuning/stores/train \
        runs/finetuning/stores/old --new runs/finetuning/stores/held_out --old runs/demo/stores/valid
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it can be run by path

from hrm_megatron.program import listen, one_line  # noqa: E402

if __name__ == "__main__":
    listen()

from hrm_megatron.parallel.cpu import activate  # noqa: E402
from hrm_megatron.parallel.log_levels import be_quiet  # noqa: E402

be_quiet()
activate()

import torch  # noqa: E402
from torch.utils.data import default_collate  # noqa: E402

from hrm_megatron.config import ConfigError, LoRA  # noqa: E402
from hrm_megatron.data.batch import PackedBatch  # noqa: E402
from hrm_megatron.data.dataset import PackedRows  # noqa: E402
from hrm_megatron.data.indexed_examples import IndexedExamples  # noqa: E402
from hrm_megatron.data.mixture import Mixture, Selection  # noqa: E402
from hrm_megatron.generate.load import load_model, open_checkpoint  # noqa: E402
from hrm_megatron.model.hrm import STACKS, HRMModel  # noqa: E402
from hrm_megatron.model.lora import adapt  # noqa: E402
from hrm_megatron.model.ticks import split_bp_steps  # noqa: E402
from hrm_megatron.optim.adam_atan2 import AdamATan2  # noqa: E402
from hrm_megatron.optim.schedule import LRSchedule  # noqa: E402
from hrm_megatron.parallel.single import single_rank  # noqa: E402
from hrm_megatron.training.metrics import loss_sums  # noqa: E402

ROWS_PER_STEP, ROW_TOKENS, BP_STEPS, MIN_LR_RATIO = 8, 256, 5, 0.1


@dataclass(frozen=True)
class Way:
    """A way to fine-tune, and the rates to try; `rank` is that of its adapters, 0: all weights are trained."""

    name: str
    rates: tuple[float, ...]
    by_ticks: bool = False
    rank: int = 0


WAYS = (
    Way("all weights, one rate", (1e-3, 2e-3, 4e-3, 8e-3)),
    Way("all weights, the rate of a stack divided by its gradient ticks", (1e-3, 2e-3, 4e-3, 8e-3), by_ticks=True),
    Way("LoRA of rank 8 on both stacks", (4e-3, 8e-3, 1.6e-2, 3.2e-2), rank=8),
    Way("LoRA of rank 32 on both stacks", (4e-3, 8e-3, 1.6e-2, 3.2e-2), rank=32),
)


def batches(rows: PackedRows) -> Iterator[PackedBatch]:
    for first in range(0, len(rows), ROWS_PER_STEP):
        yield PackedBatch.from_rows(default_collate([rows[i] for i in range(first, min(first + ROWS_PER_STEP,
                                                                                       len(rows)))]))


@torch.no_grad()
def exact(model: HRMModel, prefix: Path) -> float:
    """Return the share of examples whose labels are all the argmax, so that greedy decoding answers exactly right."""
    store = IndexedExamples(prefix)
    rows = PackedRows(store, ROW_TOKENS, 0, 0, fixed=True)
    rows.num_rows = rows.rows_per_epoch
    reports = torch.stack([loss_sums(batch, model(batch))[2]["exact accuracy"] for batch in batches(rows)])
    right, all_of_them = reports.sum(0).tolist()
    return float(right / all_of_them)


def groups(model: HRMModel, way: Way) -> list[dict[str, object]]:
    """Return the trained parameters as optimizer groups, each with its factor on the rate."""
    arch = model.config.arch
    h, l_ = split_bp_steps(arch.h_cycles, arch.l_cycles, BP_STEPS)
    ticks = {STACKS["H"]: h, STACKS["L"]: l_} if way.by_ticks else {}
    return [{"params": [parameter], "share": 1 / ticks.get(name.split(".")[0], 1)}
            for name, parameter in model.named_parameters() if parameter.requires_grad]


def tune(model: HRMModel, way: Way, rate: float, rows: PackedRows, updates: int, seed: int) -> None:
    """Fine-tune the model in place."""
    if way.rank:
        adapt(model, LoRA(way.rank, way.rank), seed)
    optimizer = AdamATan2(groups(model, way), rate)
    schedule = LRSchedule(rate, MIN_LR_RATIO * rate, 0, updates)
    for step, batch in zip(range(1, updates + 1), batches(rows), strict=False):
        model.zero_grad()
        loss, labels, _ = loss_sums(batch, model(batch, bp_steps=BP_STEPS))
        (loss / labels).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * schedule.at(step)
        optimizer.step()


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return one_line(lambda: compare(args))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="checkpoints to begin from, by their EMA")
    parser.add_argument("--train", type=Path, nargs="+", action="extend", required=True, help="datasets to train on")
    parser.add_argument("--new", type=Path, required=True, help="held-out dataset of the new kind")
    parser.add_argument("--old", type=Path, required=True, help="held-out dataset of what the model knew")
    parser.add_argument("--updates", type=int, default=60, help="of each way (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="of the rows' order (default: %(default)s)")
    return parser.parse_args(arguments)


def compare(args: argparse.Namespace) -> None:
    """Fine-tune in every way, and print the results."""
    for name in ("updates", "seeds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    began = time.monotonic()
    with single_rank():
        checkpoint = open_checkpoint(args.load)
        model = load_model(checkpoint)
        print(f"before: new {exact(model, args.new):.1%}, old {exact(model, args.old):.1%}", flush=True)
        for seed in range(args.seeds):
            rows = PackedRows(Mixture([IndexedExamples(path) for path in args.train], ROW_TOKENS, Selection(seed=seed)),
                              ROW_TOKENS, seed, args.updates * ROWS_PER_STEP)
            for way in WAYS:
                for rate in way.rates:
                    model = load_model(checkpoint)
                    tune(model, way, rate, rows, args.updates, seed)
                    shares = exact(model, args.new), exact(model, args.old)
                    found.setdefault((way.name, rate), []).append(shares)
                    print(f"{time.monotonic() - began:6.0f} s  seed {seed}  {way.name}, {rate:g}: new {shares[0]:.1%}, "
                          f"old {shares[1]:.1%}", flush=True)
    print(f"\nAfter {args.updates} updates of {ROWS_PER_STEP * ROW_TOKENS:,} tokens, {args.seeds} seeds (mean, lowest "
          "to highest):\n\n| way | rate | new kind | old kinds |\n|---|---|---|---|")
    for (name, rate), values in found.items():
        cells = [f"{sum(of) / len(of):.1%} ({min(of):.1%} to {max(of):.1%})" for of in zip(*values, strict=True)]
        print(f"| {name} | {rate:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
