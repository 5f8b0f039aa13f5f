"""Train an HRM: `torchrun -m hrm_megatron.pretrain --hrm-preset B --data-path PREFIX ...`."""
from __future__ import annotations

import functools
import os
import sys
import time
from typing import Any

from hrm_megatron.parallel.connections import choose_connections
from hrm_megatron.parallel.cpu import activate

choose_connections(sys.argv[1:])
activate()

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import pretrain  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from hrm_megatron.config import ConfigError  # noqa: E402
from hrm_megatron.training.agreement import check_agreement  # noqa: E402
from hrm_megatron.training.arguments import parse_arguments  # noqa: E402
from hrm_megatron.training.checkpoint import check_checkpoint, check_fit, guard_saves  # noqa: E402
from hrm_megatron.training.data import datasets_provider, open_sources  # noqa: E402
from hrm_megatron.training.fsdp import install_fsdp  # noqa: E402
from hrm_megatron.training.layout import describe  # noqa: E402
from hrm_megatron.training.memory import LESS_MEMORY  # noqa: E402
from hrm_megatron.training.optimizer import install  # noqa: E402
from hrm_megatron.training.overlap import install_overlap  # noqa: E402
from hrm_megatron.training.schedule import install_schedule  # noqa: E402
from hrm_megatron.training.step import TrainingStep  # noqa: E402
from hrm_megatron.training.verification import verify_start  # noqa: E402


def train() -> None:
    """Run Megatron's own training loop over our model, data and optimizer."""
    sources = {}

    def vocab_size_of(args: object) -> int:
        sources["all"] = open_sources(args)  # type: ignore[arg-type]
        return sources["all"].vocab_size

    args = parse_arguments(vocab_size_of)
    start = check_checkpoint(args)
    if not args.rank:
        print(describe(args), flush=True)
    step = TrainingStep(args)
    install(args, step)
    install_schedule(args, step)
    install_overlap(args)
    install_fsdp(args)
    guard_saves(args)

    def build_model(vp_stage: int | None = None, **options: Any) -> Any:
        if not vp_stage:  # the first call, and the first moment at which there is a process group
            check_agreement(sources["all"].files)
            verify_start(args, start, functools.partial(check_fit, args))
        return step.build_model(vp_stage=vp_stage, **options)

    pretrain(pretrain_cfg_container_from_args(args), datasets_provider(args, sources["all"], step.meter.restart),
             ModelType.encoder_or_decoder, step.forward, build_model)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main() -> None:
    rank = int(os.environ.get("RANK", "0"))
    try:
        train()
    except ConfigError as error:
        if rank:
            time.sleep(5)  # where all ranks see the same, the launcher ends this one before it repeats rank 0
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"error: rank {rank}: {str(error).splitlines()[0]} {LESS_MEMORY}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
