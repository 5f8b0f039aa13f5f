"""Output head fused with the loss, so that the logits of a whole micro-batch never exist at once.

Positions are scored in chunks. Backward recomputes the logits of every chunk except the last, which forward keeps: the
gradient of the weight needs the incoming gradient of each label, unknown in forward. This third matmul costs HRM-Text
XL about 1 % of a step (2 h v FLOPs per label, of 18 billion per token); keeping all fp32 logits would take gigabytes.
Nothing is recomputed where one chunk suffices.
"""
from __future__ import annotations

from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear

from hrm_megatron.config import HEAD_CHUNK_BYTES
from hrm_megatron.parallel.main_grad import add_weight_gradient, already_added
from hrm_megatron.parallel.processor import matmul


@torch.compile(dynamic=True)
def _summarize(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest logit in fp32, its column (the first of ties) and sum(exp(logit - largest)): [n, v/tp] to
    [n]."""
    largest, column = logits.max(-1)
    largest = largest.float()
    return largest, column, torch.sub(logits, largest.unsqueeze(-1)).exp_().sum(-1)


@torch.compile(dynamic=True)
def _scaled_softmax(logits: torch.Tensor, largest: torch.Tensor, sums: torch.Tensor,
                    scale: torch.Tensor) -> torch.Tensor:
    """Return softmax times `scale`, computed in fp32 and rounded once: logits [n, v/tp], the others [n], to [n, v/tp].

    May overwrite the logits: on a CPU the page faults of fresh memory cost more than the arithmetic.
    """
    largest, sums, scale = (t.unsqueeze(1) for t in (largest, sums, scale))
    over = not torch.compiler.is_compiling() and logits.dtype == largest.dtype
    shifted = logits.sub_(largest) if over else torch.sub(logits, largest)
    return shifted.exp_().div_(sums).mul_(scale).to(logits.dtype)


def _wide(t: torch.Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


class LabelScores(torch.autograd.Function):
    """x [n, h], weight [v/tp, h] and labels [n] to fp32 [2, n]: cross-entropy, and 1 where the label is the argmax.

    x and the scores are the same on all ranks of `group`, and the gradient of x is summed over them. Logits have the
    dtype of x; everything after them is fp32 (fp64 if x is). With `main_grad` the gradient of the weight is added to
    it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_rows: int,
                group: Any, main_grad: torch.Tensor | None) -> torch.Tensor:
        width = len(weight)
        columns = labels - group.rank() * width
        own = (columns >= 0) & (columns < width)
        columns = columns.clamp(0, width - 1).unsqueeze(1)
        largest, sums, targets, hits = x.new_empty(4, len(x), dtype=_wide(x))
        ctx.chunks = [slice(start, start + chunk_rows) for start in range(0, len(x), chunk_rows)]
        logits = None
        for rows in ctx.chunks:
            logits = matmul(x[rows], weight)
            largest[rows], column, sums[rows] = _summarize(logits)
            targets[rows] = logits.gather(1, columns[rows]).squeeze(1)
            hits[rows] = own[rows] & (column == columns[rows, 0])
        if group.size() > 1:
            largest, sums, targets, hits = _over_shards(
                torch.stack((largest, sums, torch.where(own, targets, 0.0), hits)), group)
        ctx.save_for_backward(x, weight, columns, own, largest, sums)
        ctx.group, ctx.main_grad, ctx.last_logits = group, main_grad, logits
        return torch.stack((sums.log() - (targets - largest), hits))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, columns, own, largest, sums = ctx.saved_tensors
        of_label = grads[0][0]
        dx = torch.empty_like(x)
        total, fused, trained = ctx.main_grad, ctx.main_grad is not None, ctx.needs_input_grad[1]
        if trained and not fused:
            total = torch.zeros_like(weight, dtype=_wide(weight))
        logits, ctx.last_logits = ctx.last_logits, None
        transfers = []
        for rows in reversed(ctx.chunks):
            if logits is None:
                logits = matmul(x[rows], weight)
            # Clones: the compiled function would guard on the storage offset of a view.
            top, total_sum, scale = (t[rows].clone() for t in (largest, sums, of_label))
            # The label's own entry is computed separately: softmax - 1 loses precision once softmax is rounded to bf16.
            target = logits.gather(1, columns[rows]).squeeze(1)
            of_target = torch.sub(target, top).exp_().div_(total_sum).sub_(own[rows].float()).mul_(scale)
            grad = _scaled_softmax(logits, top, total_sum, scale)
            grad.scatter_(1, columns[rows], of_target.unsqueeze(1).to(grad.dtype))
            logits = None
            dx[rows] = matmul(grad, weight.t())
            if ctx.group.size() > 1:
                transfers.append(torch.distributed.all_reduce(dx[rows], group=ctx.group, async_op=True))
            if trained:
                add_weight_gradient(total, grad, x[rows])
        for transfer in transfers:
            transfer.wait()
        if not trained:
            return dx, *[None] * 5
        return dx, already_added(weight) if fused else total.to(weight.dtype), *[None] * 4


def _over_shards(parts: torch.Tensor, group: Any) -> tuple[torch.Tensor, ...]:
    """Combine each rank's (largest, sums, targets, hits), [4, n], over the shards of the vocabulary."""
    gathered = parts.new_empty(group.size() * len(parts), parts.shape[1])
    torch.distributed.all_gather_into_tensor(gathered, parts, group=group)
    shard_largest, sums, targets, hits = gathered.view(group.size(), *parts.shape).unbind(1)
    largest, first = shard_largest.max(0)  # of ties the first has the lowest token id
    sums = (sums * torch.exp(shard_largest - largest)).sum(0)
    return largest, sums, targets.sum(0), hits.gather(0, first.unsqueeze(0)).squeeze(0)


class LabelHead(ColumnParallelLinear):  # type: ignore[misc]
    """Megatron's output layer without a bias, which also scores labels if given."""

    def __init__(self, input_size: int, output_size: int, *, config: ModelParallelConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, bias=False, **options)
        self.chunk_rows = max(1, HEAD_CHUNK_BYTES // (4 * self.output_size_per_partition))

    def forward(self, input_: torch.Tensor, *arguments: Any, labels: torch.Tensor | None = None, **options: Any) -> Any:
        """Apply the head to [s, b, h] as Megatron does; or score `labels` [n] from states [n, h], see `LabelScores`."""
        if labels is None:
            return super().forward(input_, *arguments, **options)
        fusion = self.gradient_accumulation_fusion and self.weight.requires_grad
        main_grad = self.weight.main_grad if fusion else None
        return LabelScores.apply(input_, self.weight, labels, self.chunk_rows, self.tp_group, main_grad)
