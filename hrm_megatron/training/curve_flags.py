"""When `--log-hrm-norms` (training/curves.py) is refused."""
from __future__ import annotations

import argparse

from hrm_megatron.config import ConfigError, refuse_beside

FLAG = "--log-hrm-norms"


def check_curves(args: argparse.Namespace) -> None:
    """Refuse norms that nobody could read, or that are not built."""
    if not args.log_hrm_norms:
        return
    if not args.tensorboard_dir:
        raise ConfigError(f"{FLAG}: has no effect without --tensorboard-dir; give that too, or leave it out")
    refuse_beside(FLAG, {"--skip-train": args.skip_train})
    if args.use_torch_fsdp2 or args.use_megatron_fsdp:
        raise ConfigError(f"{FLAG}: not built under FSDP; leave it or the FSDP flag out")
