"""Flags and checks of `--log-hrm-norms` (training/curves.py), `--log-loss-by-source` (training/source_losses.py) and
`--run-report` (monitoring/report.py)."""
from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from hrm_megatron.config import ConfigError, refuse_beside
from hrm_megatron.program import check_outputs

NORMS, BY_SOURCE, REPORT = "--log-hrm-norms", "--log-loss-by-source", "--run-report"


def add_curves(group: argparse._ArgumentGroup) -> None:
    group.add_argument(NORMS, action="store_true",
                       help="write norms of z_H and z_L by tick, of the update and of the EMA's distance to "
                            "TensorBoard, every --tensorboard-log-interval steps")
    group.add_argument(BY_SOURCE, action="store_true",
                       help="likewise the loss of the labels of each source, of each dataset if they have many")
    group.add_argument(REPORT, metavar="FILE",
                       help="with --tensorboard-dir, write what became of the run as one HTML file when training "
                            "ends, also by a signal that it takes or an interval to exit at")


def check_curves(args: argparse.Namespace) -> None:
    """Refuse curves that would not be written or are not implemented."""
    for flag, given in ((NORMS, args.log_hrm_norms), (BY_SOURCE, args.log_loss_by_source), (REPORT, args.run_report)):
        if given and not args.tensorboard_dir:
            raise ConfigError(f"{flag}: has no effect without --tensorboard-dir; give that too, or leave it out")
        if given:
            refuse_beside(flag, {"--skip-train": args.skip_train})
    if args.run_report:
        check_outputs({REPORT: Path(args.run_report)}, (".html", ".htm"))
    if args.run_report and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f'{REPORT} {args.run_report}: needs matplotlib, which is not installed; pip install -e '
                          '".[monitor]"')
    if args.log_hrm_norms and (args.use_torch_fsdp2 or args.use_megatron_fsdp):
        raise ConfigError(f"{NORMS}: not built under FSDP; leave it or the FSDP flag out")
    if args.log_loss_by_source and args.sampled_data_path:
        raise ConfigError(f"{BY_SOURCE}: a folder of HRM-Text (--sampled-data-path {args.sampled_data_path}) does not "
                          "say where its examples are from; leave one of them out")
