"""Keep Megatron's overlapped gradient reduction right while the number of gradient ticks changes during a run."""
from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


class OverlappedReduction:
    """Tells DDP what it cannot see by itself (distributed/param_and_grad_buffer.py, _ParamAndGradBucketGroup).

    DDP counts in one batch how often each gradient of a bucket arrives and later starts to reduce the bucket when
    the counts are reached. Both the counts and the set of weights with a gradient depend on bp_steps.
    """

    def __init__(self) -> None:
        self.bp_steps: int | None = None

    def before_forward(self, model: torch.nn.Module, bp_steps: int, untrained: torch.Tensor | None) -> None:
        """Prepare a micro-batch; `untrained` is a weight that will get no gradient in it."""
        if not isinstance(model, DistributedDataParallel) or not model.ddp_config.overlap_grad_reduce:
            return
        groups: list[Any] = model.bucket_groups
        if bp_steps != self.bp_steps:
            self.bp_steps = bp_steps
            for group in groups:  # count again; this step reduces without overlap
                group.is_first_batch = True
                group.golden_per_param_grad_ready_counts = {}
                group.per_param_grad_ready_counts = {}
        if untrained is not None:
            model.param_to_bucket_group[untrained].register_grad_ready(untrained)
