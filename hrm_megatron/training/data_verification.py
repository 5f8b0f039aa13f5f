"""Verify the data of a run against the checksums stored when it was written, divided among all ranks."""
from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from hrm_megatron.checkpoint.verify import share
from hrm_megatron.config import ConfigError
from hrm_megatron.data.indexed_examples import IndexedExamples

log = logging.getLogger(__name__)


def verify_data(datasets: Sequence[IndexedExamples]) -> None:
    """Read every byte of the datasets once, each rank a share; if one is damaged, raise ConfigError on all ranks."""
    began = time.perf_counter()
    blocks = [block for dataset in {dataset.prefix: dataset for dataset in datasets}.values()
              for block in dataset.blocks()]
    damage = None
    try:
        for block in share(blocks, torch.distributed.get_rank(), torch.distributed.get_world_size()):
            block.verify()
    except ConfigError as error:
        damage = str(error)
    everyone: list[str | None] = [damage] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, damage)
    if first := next(filter(None, everyone), None):
        raise ConfigError(first)
    log.info(f"data: verified: {sum(block.length for block in blocks) / 1e9:.2f} GB in "
             f"{time.perf_counter() - began:.1f} s")
