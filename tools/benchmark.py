"""Benchmark training, generation and data tools: against another implementation, or as users run them.

    python tools/benchmark.py step      # fp32 on the CPU, against transformers' HrmText, in the same process
    python tools/benchmark.py generate  # answers on the CPU, against transformers' HrmText.generate, likewise
    python tools/benchmark.py tokenize  # rows to ids, against Megatron's path with the HuggingFace tokenizer
    python tools/benchmark.py plan      # split, shuffle, pack, and the start of a process, by number of examples
    python tools/benchmark.py deduplicate  # the search for duplicates, by number of examples
    python tools/benchmark.py gpu --hrm-preset XL --row-tokens 24576 [-- --fp8-format hybrid ...]
    python tools/benchmark.py convert   # random weights of XL in every direction: time, memory, bytes
    python tools/benchmark.py host      # what a micro-batch costs the host: launches, calls, time
    python tools/benchmark.py attention # te, varlen and flash-attn side by side
    python tools/benchmark.py calibrate --output FILE  # this device's speeds, for tools/plan.py --calibrate
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

import torch  # noqa: E402
import transformers  # noqa: E402

from hrm_megatron.benchmark.against_transformers import (  # noqa: E402
    ARCHITECTURE,
    BP_STEPS,
    ROW_TOKENS,
    compare_steps,
    peer_bp_steps,
    transformers_step,
)
from hrm_megatron.benchmark.attention import compare_kernels, random_lengths  # noqa: E402
from hrm_megatron.benchmark.conversion import report  # noqa: E402
from hrm_megatron.benchmark.count import Listed, count  # noqa: E402
from hrm_megatron.benchmark.generation import ARCHITECTURES, compare_generation  # noqa: E402
from hrm_megatron.benchmark.host import measure_host, table  # noqa: E402
from hrm_megatron.benchmark.peak import (  # noqa: E402
    in_the_longest_row_that_fits,
    matmul_flops_per_second,
    median_seconds,
)
from hrm_megatron.benchmark.record import add_row, check_table, device_name, output_folder, versions  # noqa: E402
from hrm_megatron.benchmark.steps import calibrate  # noqa: E402
from hrm_megatron.benchmark.steps import table as calibration_table  # noqa: E402
from hrm_megatron.benchmark.train import Measured, measure  # noqa: E402
from hrm_megatron.config import PRESETS, Architecture, ConfigError, Preset  # noqa: E402
from hrm_megatron.data.dataset import PackedRows  # noqa: E402
from hrm_megatron.data.sampled import SampledFolder  # noqa: E402
from hrm_megatron.parallel.machine import Machine  # noqa: E402
from hrm_megatron.parallel.single import single_rank  # noqa: E402

GOLDEN_LENGTHS = Path(__file__).parents[1] / "tests" / "golden" / "sampled"  # lengths of many short examples
COLUMNS = ("device", "versions", "command", "tokens/s", "TFLOP/s", "of the measured peak", "peak memory", "kernels",
           "transformers' tokens/s")  # columns of the table that --record extends


def time_steps(args: argparse.Namespace) -> None:
    """Print the time of a step here and in transformers."""
    torch.set_num_threads(args.threads)
    architecture = dataclasses.replace(ARCHITECTURE, num_layers=args.layers)
    sizes = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(architecture).items() if value)
    print(f"torch {torch.__version__}, {args.threads} thread(s); {ROW_TOKENS} packed tokens, bp {BP_STEPS}; {sizes}")
    with single_rank():
        compare_steps(args.pairs, architecture)


def measure_training(args: argparse.Namespace) -> None:
    """Print speed, share of the device's measured peak, peak memory, and the time by kind of kernel."""
    preset = PRESETS[args.hrm_preset] if args.hrm_preset else Preset(*args.sizes)
    if args.record:
        check_table(args.record, COLUMNS)
    if args.peer:
        peer_bp_steps(preset.architecture(), args.bp_steps)
    cells = [device_name(), versions(), f"`python {' '.join(sys.argv)}`"]
    print("; ".join(cells))
    folder = output_folder(args.output)
    found = measure(preset, args.row_tokens, args.rows, args.steps, args.vocab_size, args.bp_steps, folder,
                    ["--bf16", *args.flags])
    peak = matmul_flops_per_second(size=args.peak_size)
    print(f"{args.rows} rows of {args.row_tokens} tokens a step, bp {args.bp_steps}, bf16 {' '.join(args.flags)}")
    print(f"tokens/s     {found.tokens_per_second:12,.0f}   median of {args.steps} steps of {found.step_seconds:.3f} s")
    print(f"TFLOP/s      {found.flops_per_second / 1e12:12.2f}   {found.flops_per_second / peak:.1%} of the "
          f"{peak / 1e12:.2f} that bf16 matmuls of size {args.peak_size} reach here")
    print(f"peak memory  {found.peak_bytes / 1e9:12.2f}   GB")
    for share in found.shares:
        print(f"  {share.share:6.1%}  {share.group}")
    cells += [f"{found.tokens_per_second:,.0f}", f"{found.flops_per_second / 1e12:.1f}",
              f"{found.flops_per_second / peak:.1%}", f"{found.peak_bytes / 1e9:.1f} GB",
              ", ".join(f"{share.group} {share.share:.1%}" for share in found.shares)]
    if args.peer:
        cells.append(time_peer(found, args, folder / "data"))
    print(f"trace, log and output: {folder}")
    if args.record:
        add_row(args.record, dict(itertools.zip_longest(COLUMNS, cells, fillvalue="not timed")))


def time_peer(ours: Measured, args: argparse.Namespace, data: Path) -> str:
    """Time transformers' HrmText on the first row of `data`, or a shorter row if that does not fit; print the result
    and return it as a table cell."""
    def seconds(row_tokens: int) -> float:
        row = PackedRows(SampledFolder(data), row_tokens, 0, 1)[0]
        step = transformers_step({name: tensor[None] for name, tensor in row.items()}, ours.architecture,
                                 args.bp_steps, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
        return median_seconds(step, args.steps, warmup=2)

    timed = in_the_longest_row_that_fits(seconds, args.row_tokens)
    if timed is None:
        return "out of memory"
    speed = timed[0] / timed[1]
    print(f"transformers {speed:12,.0f}   tokens/s, forward and backward of a row of {timed[0]} tokens in bf16, no "
          f"optimizer; ours is {ours.tokens_per_second / speed:.2f} times as fast with one")
    return f"{speed:,.0f}" + ("" if timed[0] == args.row_tokens else f" in rows of {timed[0]}")


def count_host(args: argparse.Namespace) -> None:
    """Print the host cost of micro-batches of each size in --rows."""
    preset = PRESETS[args.hrm_preset]
    architecture = Architecture(preset.num_layers, preset.hidden_size, preset.num_attention_heads,
                                preset.ffn_hidden_size, 65_536)
    if args.compile_layers and not torch.cuda.is_available():
        if not shutil.which("g++"):
            raise ConfigError("--compile-layers: without CUDA torch compiles by g++, which is not there; leave it out")
        del os.environ["TORCHDYNAMO_DISABLE"]  # set by `activate`
    print(f"{device_name()}, torch {torch.__version__}; {preset.num_layers} layers of {args.hrm_preset} in each stack, "
          f"{'compiled' if args.compile_layers else 'plain'}")
    with single_rank():
        for rows in args.rows:
            print(f"micro-batch of {rows} x {args.row_tokens} tokens")
            print(*table(measure_host(architecture, args.row_tokens, rows, args.compile_layers)), sep="\n", flush=True)


def time_attention(args: argparse.Namespace) -> None:
    """Print the time of each attention kernel on micro-batches with a folder's lengths, and with random lengths."""
    print(f"{device_name()}, {versions()}")
    prefixes, targets = SampledFolder(args.lengths).epoch_lengths(0)
    of_folder = [(int(p), int(t) - 1) for p, t in zip(prefixes, targets, strict=True)]
    with single_rank():
        machine = Machine.here()
        for name, lengths in ((str(args.lengths), of_folder), ("random lengths", random_lengths())):
            for rows in args.rows:
                print(name, end=", ")
                for line in compare_kernels(machine, lengths, args.row_tokens, rows, args.heads, args.head_dim,
                                            args.rounds):
                    print(line, flush=True)


def measure_conversions(args: argparse.Namespace) -> None:
    """Print the time, memory and bytes of each conversion."""
    sizes = Preset(*args.sizes) if args.sizes else PRESETS[args.hrm_preset]
    architecture = Architecture(sizes.num_layers, sizes.hidden_size, sizes.num_attention_heads, sizes.ffn_hidden_size,
                                args.vocab_size)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.output) as folder:
        for line in report(architecture, Path(folder), args.weights_only):
            print(line, flush=True)


def calibrate_planner(args: argparse.Namespace) -> None:
    """Measure steps of small models, write the fitted speeds, and print the errors of the predictions."""
    torch.set_num_threads(args.threads)
    if not args.output.parent.is_dir():
        raise ConfigError(f"--output {args.output}: there is no folder {args.output.parent}; make it, or name another")
    logging.disable(logging.WARNING)  # Megatron's warnings about things that a run sets up
    source = f"fitted to steps on {device_name()}, {versions()}"
    with single_rank():
        found = calibrate(getattr(torch, args.dtype), args.rounds, source)
    found.write(args.output)
    print(source)
    print(*calibration_table(found), sep="\n")
    print(args.output)


def time_generation(args: argparse.Namespace) -> None:
    """Print the speed of generation here and in transformers."""
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    if args.shortest is not None and not 0 < args.shortest <= args.new_tokens:
        raise ConfigError(f"--shortest {args.shortest}: is from 1 to --new-tokens {args.new_tokens}")
    compare_generation(args.models, args.batches, args.dtypes, args.prompt_tokens, args.new_tokens, args.shortest,
                       args.pairs, args.cpu_time)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="one training step, fp32 on the CPU, against transformers' HrmText")
    step.add_argument("--pairs", type=count, default=15, help="of a step of ours and one of transformers, in turns")
    step.add_argument("--layers", type=count, default=2, help="of each stack")
    step.add_argument("--threads", type=count, default=1)
    gpu = commands.add_parser("gpu", help="training as hrm_megatron.pretrain does it, on one device")
    size = gpu.add_mutually_exclusive_group(required=True)
    size.add_argument("--hrm-preset", choices=[*PRESETS])
    size.add_argument("--sizes", type=count, nargs=3, metavar=("LAYERS", "HIDDEN", "HEADS"))
    gpu.add_argument("--row-tokens", type=count, default=24_576)
    gpu.add_argument("--rows", type=count, default=4, help="rows a step, one micro-batch each")
    gpu.add_argument("--steps", type=count, default=10)
    gpu.add_argument("--bp-steps", type=count, default=BP_STEPS)
    gpu.add_argument("--vocab-size", type=count, default=65_536)
    gpu.add_argument("--peak-size", type=count, default=8192, help="of the matrices that measure the device's peak")
    gpu.add_argument("--output", type=Path, help="folder for trace, log and output (default: a new one)")
    gpu.add_argument("--record", type=Path, metavar="FILE", help="add a row to the table of this Markdown file")
    gpu.add_argument("--peer", action="store_true", help="also time transformers' HrmText, compiled on a GPU")
    gpu.add_argument("flags", nargs="*", help="after --: more flags of hrm_megatron.pretrain")
    conversion = commands.add_parser("convert", help="conversions of random weights in every direction")
    size = conversion.add_mutually_exclusive_group()
    size.add_argument("--hrm-preset", choices=[*PRESETS], default="XL")
    size.add_argument("--sizes", type=count, nargs=3, metavar=("LAYERS", "HIDDEN", "HEADS"))
    conversion.add_argument("--vocab-size", type=count, default=65_536)
    conversion.add_argument("--weights-only", action="store_true", help="without optimizer state, for large models")
    conversion.add_argument("--output", type=Path, metavar="DIR", help="existing folder on the disk to measure, which "
                            "needs room for ten times the weights in fp32, or two with --weights-only")
    answers = commands.add_parser("generate", help="greedy answers on the CPU, against transformers' HrmText.generate")
    answers.add_argument("--models", nargs="+", action=Listed, choices=[*ARCHITECTURES], default=[*ARCHITECTURES])
    answers.add_argument("--batches", type=count, nargs="+", action=Listed, default=[1, 8, 32])
    answers.add_argument("--dtypes", nargs="+", action=Listed, choices=["float32", "bfloat16"],
                         default=["float32", "bfloat16"])
    answers.add_argument("--prompt-tokens", type=count, default=128,
                         help="of the longest prompt; the shortest has half")
    answers.add_argument("--new-tokens", type=count, default=128,
                         help="of every answer, with --shortest of the longest")
    answers.add_argument("--shortest", type=count, metavar="TOKENS", help="answers of mixed length instead, from this "
                         "to --new-tokens, and more prompts than a batch holds")
    answers.add_argument("--pairs", type=count, default=3, help="of a run of ours and one of transformers, in turns")
    answers.add_argument("--threads", type=count, default=1)
    answers.add_argument("--cpu-time", action="store_true",
                         help="time the process and not the clock: for a machine that others use (one thread)")
    host = commands.add_parser("host", help="launches, calls and time of the host in a tick and in a micro-batch")
    host.add_argument("--hrm-preset", choices=[*PRESETS], default="XL", help="its number of layers; on a GPU its sizes")
    host.add_argument("--row-tokens", type=count, default=4096)
    host.add_argument("--rows", type=count, nargs="+", action=Listed, default=[1, 4], help="of a micro-batch")
    host.add_argument("--compile-layers", action="store_true")
    attention = commands.add_parser("attention", help="the kernels side by side, forward and backward, by lengths")
    attention.add_argument("--lengths", type=Path, metavar="DIR", default=GOLDEN_LENGTHS,
                           help="HRM-Text's sampled folder whose lengths are taken beside random ones")
    attention.add_argument("--row-tokens", type=count, default=4096)
    attention.add_argument("--rows", type=count, nargs="+", action=Listed, default=[1, 4], help="of a micro-batch")
    attention.add_argument("--heads", type=count, default=12)
    attention.add_argument("--head-dim", type=count, default=128)
    attention.add_argument("--rounds", type=count, default=20)
    steps = commands.add_parser("calibrate", help="small steps, for the speeds that tools/plan.py --calibrate takes")
    steps.add_argument("--output", type=Path, metavar="FILE", required=True)
    steps.add_argument("--dtype", choices=["float32", "bfloat16"],
                       default="bfloat16" if torch.cuda.is_available() else "float32")
    steps.add_argument("--rounds", type=count, default=5, help="steps of each model, of which the median counts")
    steps.add_argument("--threads", type=count, default=1, help="on a CPU")
    commands.add_parser("tokenize", add_help=False, help="rows to ids on one core, against Megatron's own path")
    commands.add_parser("plan", add_help=False, help="what a run does before its first row, by number of examples")
    commands.add_parser("deduplicate", add_help=False, help="the search for duplicates, by number of examples")
    args, rest = parser.parse_known_args()
    # In a program without torch, since their worker processes would import it too.
    if args.command in ("tokenize", "plan", "deduplicate"):
        return subprocess.run([sys.executable, "-m", f"hrm_megatron.benchmark.{args.command}", *rest]).returncode
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    run = dict(step=time_steps, gpu=measure_training, host=count_host, attention=time_attention,
               convert=measure_conversions, generate=time_generation, calibrate=calibrate_planner)
    return one_line(lambda: run[args.command](args))


if __name__ == "__main__":
    sys.exit(main())
