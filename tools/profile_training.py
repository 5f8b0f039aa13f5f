"""Train some steps under torch's profiler, write the trace, and print the time of a step by kind of kernel.

    python tools/profile_training.py --output runs/profile --nproc-per-node 8 -- --hrm-preset XL --data-path ...

Everything after -- is passed to hrm_megatron.pretrain, except flags about saving: files are written only to DIR. Open
the trace, DIR/torch_profile/rank-0.json.gz, in Perfetto.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hrm_megatron.program import listen, one_line, run_command

if __name__ == "__main__":
    listen()

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

from hrm_megatron.benchmark.count import count  # noqa: E402
from hrm_megatron.benchmark.kernels import breakdown  # noqa: E402
from hrm_megatron.benchmark.profiled import first_iteration, last_iteration, without_saves  # noqa: E402
from hrm_megatron.config import ConfigError  # noqa: E402

OWN_FLAGS = ("--tensorboard-dir", "--profile", "--use-pytorch-profiler", "--profile-ranks", "--profile-step-start",
             "--profile-step-end", "--exit-interval")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--nproc-per-node", default="1")
    parser.add_argument("--first-step", type=count, default=10, help="that is profiled, counted from where the run "
                        "starts (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=2, help="that are profiled (default: %(default)s)")
    parser.add_argument("flags", nargs="+", help="of hrm_megatron.pretrain")
    args = parser.parse_args()
    return one_line(lambda: profile(args))


def profile(args: argparse.Namespace) -> None:
    clashing = {flag.partition("=")[0] for flag in args.flags} & {*OWN_FLAGS}
    if clashing:
        raise ConfigError(f"{min(clashing)}: this tool gives it, by --output, --first-step and --steps; leave it out")
    trace = args.output / "torch_profile" / "rank-0.json.gz"
    if trace.exists():
        raise ConfigError(f"{trace} exists; give another --output, or remove it")
    flags, left_out = without_saves(args.flags)
    if left_out:
        print(f"left out, so that nothing of the run is written: {' '.join(left_out)}", flush=True)
    last = last_iteration(first_iteration(flags), args.first_step, args.steps)
    code = run_command([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.nproc_per_node, "-m",
        "hrm_megatron.pretrain", *flags, "--tensorboard-dir", args.output / "log", "--profile",
        "--use-pytorch-profiler", "--profile-ranks", "0", "--profile-step-start", str(args.first_step),
        "--profile-step-end", str(last), "--exit-interval", str(last)])
    if code or not trace.exists():
        raise ConfigError(f"no trace: the run ended with exit code {code}, and iteration {last} was to be its last; "
                          "see its output above, or lower --first-step")
    for share in breakdown(trace):
        print(f"  {share.share:6.1%}  {share.seconds / args.steps:8.4f} s a step  {share.group}")
    print(trace)


if __name__ == "__main__":
    sys.exit(main())
