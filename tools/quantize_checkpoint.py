"""Quantize a checkpoint (Megatron, transformers or HRM-Text) into a compressed-tensors folder that transformers loads.

    python tools/quantize_checkpoint.py --load runs/demo/checkpoints --tokenizer-model runs/demo/tokenizer \\
        --data-path runs/demo/stores/train --save runs/demo/int4
    python tools/quantize_checkpoint.py --load runs/demo/checkpoints --data-path runs/demo/stores/train \\
        --compare --valid-data-path runs/demo/stores/valid

Methods: rtn rounds each weight to nearest. tick0 calibrates on the inputs of the first tick, as tools do that are not
aware of the recurrence. recurrent calibrates on the inputs of all ticks, towards the outputs of the full model, and
then tunes roundings and scales jointly over the whole recurrence.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

from hrm_megatron.convert.checkpoint import EMA, RAW  # noqa: E402
from hrm_megatron.parallel.precision import DTYPES  # noqa: E402
from hrm_megatron.quantize.job import EMBEDDINGS, GROUP_SIZES, Job, size_table  # noqa: E402
from hrm_megatron.quantize.methods import METHODS  # noqa: E402
from hrm_megatron.quantize.run import quantize  # noqa: E402


def parse_arguments(arguments: Sequence[str] | None) -> Job | None:
    """Return the job that the flags describe; None with --sizes."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                argument_default=argparse.SUPPRESS)
    p.add_argument("--load", type=Path, metavar="DIR",
                   help="folder that --save named, or one iteration in it; a transformers folder; one of HRM-Text")
    p.add_argument("--save", type=Path, metavar="DIR", help="folder to write (compressed-tensors)")
    p.add_argument("--sizes", action="store_true", help="print how large each preset becomes, and end")
    p.add_argument("--scheme", choices=[*GROUP_SIZES], help=f"of layers and head (default: {Job.scheme})")
    p.add_argument("--group-size", type=int, choices=(32, 64, 128),
                   help="weights of a row that share a scale (int4; default: 64)")
    p.add_argument("--embedding", choices=[*EMBEDDINGS], help=f"(default: {Job.embedding})")
    p.add_argument("--method", choices=METHODS, help=f"(default: {Job.method})")
    data = p.add_argument_group("calibration")
    data.add_argument("--data-path", metavar="PREFIX", help="dataset of tools/preprocess_data.py")
    data.add_argument("--calibration-rows", type=int, help=f"for the Hessians (default: {Job.calibration_rows})")
    data.add_argument("--seq-length", type=int, help="positions of a row (default: the model's own)")
    data.add_argument("--micro-batch-size", type=int, help=f"rows at once (default: {Job.micro_batch_size})")
    data.add_argument("--tuning-steps", type=int,
                      help="micro-batches that roundings and scales are tuned with (recurrent; default: "
                           f"{Job.tuning_steps})")
    data.add_argument("--seed", type=int, help=f"of the choice of rows (default: {Job.seed})")
    data.add_argument("--compare", action="store_true",
                      help="print loss, exact accuracy and KL divergence before, and after each method")
    data.add_argument("--valid-data-path", metavar="PREFIX", help="dataset that --compare scores")
    source = p.add_argument_group("checkpoint and output")
    source.add_argument("--weights", choices=[EMA, RAW], help="(default: ema, or raw where there is no other)")
    source.add_argument("--ckpt-step", type=int, help="iteration (Megatron) or epoch (HRM-Text) instead of the latest")
    source.add_argument("--no-verify-checkpoint", dest="verify_checkpoint", action="store_false",
                        help="quantize what can be read of a damaged checkpoint")
    source.add_argument("--tokenizer-model", type=Path, metavar="PATH",
                        help="tokenizer of the data, to put beside the model (default: the one beside --load)")
    source.add_argument("--dtype", choices=[*DTYPES],
                        help=f"of what is not quantized, and of the computation (default: {Job.dtype})")
    source.add_argument("--max-shard-size", metavar="SIZE",
                        help=f"largest file of weights (default: {Job.max_shard_size})")
    source.add_argument("--verify", action=argparse.BooleanOptionalAction,
                        help="load the output with transformers and compare its logits with ours (default: below 2 "
                             "billion parameters)")
    source.add_argument("--overwrite", action="store_true", help="replace an existing output folder, all of it")
    given = vars(p.parse_args(arguments))
    if given.pop("sizes", False):
        if given:
            p.error(f"--sizes prints a table of the presets and nothing else; leave {min(given)} out")
        return None
    if "load" not in given:
        p.error("--load is required")
    return Job(**given, given=frozenset(given))


def main(arguments: Sequence[str] | None = None) -> int:
    job = parse_arguments(arguments)

    def lines() -> Sequence[str]:
        return quantize(job, lambda line: print(line, file=sys.stderr, flush=True)) if job else size_table()
    return one_line(lambda: print(*lines(), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
