"""Put AdamATan2 and the step-exact schedules into Megatron's optimizer machinery.

Megatron has no interface for adding an optimizer: `Adam` is replaced by AdamATan2 while Megatron builds its "adam".
Sharding, fp32 masters and communication overlap stay stock.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import local_multi_tensor_l2_norm

from hrm_megatron.optim.adam_atan2 import AdamATan2, atan2_of, init_states, quotient_of
from hrm_megatron.optim.schedule import LRSchedule
from hrm_megatron.optim.sharded import (
    EMBEDDING,
    EMADistributedOptimizer,
    NamedBF16Optimizer,
    NamedFP32Optimizer,
    parts_of,
)
from hrm_megatron.parallel.patching import temporarily

# The only key of "opt_param_scheduler" in a converted checkpoint, which has no schedule.
STEPS_DONE = "steps_done"
# The embedding is a separate group because its updates are counted separately. `is_decoupled_lr` is one of the
# keys by which Megatron identifies a saved group; 0.19.2 reads it for nothing else.
EMBEDDING_GROUP = {ParamKey(name="*embedding.word_embeddings.weight"): {EMBEDDING: True, "is_decoupled_lr": True}}


def l2_norm(_chunk: int, _overflow: torch.Tensor, tensors: list[list[torch.Tensor]], _each: bool) -> tuple[
        torch.Tensor, None]:
    """Return the norm [1] of all tensors without synchronizing, which Megatron's fallback (no Apex, no Transformer
    Engine) does once per tensor."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors[0]))).unsqueeze(0), None


def build_optimizer(config: OptimizerConfig, model_chunks: list[torch.nn.Module], ema_decay: float,
                    embedding_has_gradient: Callable[[], bool], config_overrides: dict[ParamKey, Any] | None = None,
                    adamw: bool = False, **stock_arguments: Any) -> MegatronOptimizer:
    """Return Megatron's optimizer built around AdamATan2, with AdamW's update direction if `adamw`.

    `embedding_has_gradient` is called at every step; if it returns False, the embedding is not updated.
    """
    # Without Apex or TE Megatron expects torch Adam's state["step"], which AdamATan2 does not have.
    distrib_optimizer.HAVE_APEX_OR_TE = True
    if torch.cuda.is_available() and clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm

    def build(params: Any, lr: float, weight_decay: float, betas: tuple[float, float],
              **adam_only: Any) -> torch.optim.Optimizer:
        return AdamATan2(params, lr, betas, weight_decay, ema_decay,
                         lambda group: not group.get(EMBEDDING) or embedding_has_gradient(),
                         quotient_of if adamw else atan2_of)

    replaced = dict(Adam=build, USING_PYTORCH_OPTIMIZER=False, DistributedOptimizer=EMADistributedOptimizer,
                    FP32Optimizer=NamedFP32Optimizer, Float16OptimizerWithFloat16Params=NamedBF16Optimizer)
    with temporarily(megatron_optimizer, **replaced):
        optimizer = megatron_optimizer.get_megatron_optimizer(
            config, model_chunks, config_overrides={**(config_overrides or {}), **EMBEDDING_GROUP}, **stock_arguments)
    for part in parts_of(optimizer):
        part.init_state_fn = init_states
        if part is optimizer and not config.clip_grad:  # Megatron-FSDP computes the norm only if it clips
            config.clip_grad = math.inf
    return optimizer


def make_states(optimizer: MegatronOptimizer) -> None:
    """Create the state that the first update creates: if the first steps are skipped, a save may precede it."""
    for part in parts_of(optimizer):
        if not part.is_stub_optimizer:
            init_states(part.optimizer)


class StepScheduler(OptimizerParamScheduler):  # type: ignore[misc]
    """Megatron's scheduler with HRM-Text's learning rate, a function of the current step alone.

    `running_step` returns that step, counted from 1. The number of gradient ticks uses it too, so both stay in sync
    when the batch size changes, steps are skipped, or the optimizer state is not loaded. `num_steps`, Megatron's count
    of samples, is set because checkpoints store it, but no rate depends on it. Rates are set in a pre-hook of the
    optimizer's step, so the rate logged after a step is the one that it used.
    """

    def __init__(self, optimizer: MegatronOptimizer, schedule: LRSchedule, rows_per_step: int, weight_decay: float,
                 running_step: Callable[[], int]) -> None:
        self.schedule, self.rows_per_step, self.running_step = schedule, rows_per_step, running_step
        samples = max(schedule.total_steps, schedule.warmup_steps + 1) * rows_per_step
        super().__init__(
            optimizer, init_lr=0.0, max_lr=schedule.lr, min_lr=schedule.min_lr,
            lr_warmup_steps=schedule.warmup_steps * rows_per_step, lr_decay_steps=samples, lr_decay_style="cosine",
            start_wd=weight_decay, end_wd=weight_decay, wd_incr_steps=samples, wd_incr_style="constant")
        for part in parts_of(optimizer):
            part.optimizer.register_step_pre_hook(lambda *_: self.step(0))

    def step(self, increment: int) -> None:
        """Set the learning rates of the current step; `increment` is ignored."""
        self.num_steps = self.running_step() * self.rows_per_step
        super().step(0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing: which schedule a resumed run follows was decided before anything was built."""

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Return the learning rate of the current step."""
        return self.schedule.at(self.running_step())
