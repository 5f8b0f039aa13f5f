"""Put AdamATan2 and the step-exact schedules into Megatron's optimizer machinery.

Megatron has no plug for another optimizer: it is built as "adam" while the class behind that name is ours.
Sharding, fp32 masters, overlap and checkpoints stay stock.
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

# What a converted checkpoint holds in place of a schedule.
STEPS_DONE = "steps_done"
# The embedding has a group of its own because its updates are counted apart. `is_decoupled_lr` is among the
# keys by which Megatron finds a saved group again and is read for nothing else in 0.19.2.
EMBEDDING_GROUP = {ParamKey(name="*embedding.word_embeddings.weight"): {EMBEDDING: True, "is_decoupled_lr": True}}


def l2_norm(_chunk: int, _overflow: torch.Tensor, tensors: list[list[torch.Tensor]], _each: bool) -> tuple[
        torch.Tensor, None]:
    """Norm [1] of all tensors, on their device: Megatron's own, without Apex and Transformer Engine, waits for each."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors[0]))).unsqueeze(0), None


def build_optimizer(config: OptimizerConfig, model_chunks: list[torch.nn.Module], ema_decay: float,
                    embedding_has_gradient: Callable[[], bool], config_overrides: dict[ParamKey, Any] | None = None,
                    adamw: bool = False, **stock_arguments: Any) -> MegatronOptimizer:
    """Build Megatron's optimizer around AdamATan2; `embedding_has_gradient` is asked at every step.

    `adamw`: with the direction of AdamW.
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
        if part is optimizer and not config.clip_grad:  # Megatron-FSDP's, which takes the norm only in order to clip
            config.clip_grad = math.inf
    return optimizer


def make_states(optimizer: MegatronOptimizer) -> None:
    """Make the state that a first step makes: a save may come before it, behind steps that are not taken."""
    for part in parts_of(optimizer):
        if not part.is_stub_optimizer:
            init_states(part.optimizer)


class StepScheduler(OptimizerParamScheduler):  # type: ignore[misc]
    """Megatron's scheduler with HRM-Text's learning rate, a function of the step that is running alone.

    `running_step` answers with that step, counted from 1, as it does for the gradient ticks: one clock for both,
    whether rows per step change, steps are skipped, or the optimizer's state is not loaded. Megatron's own count of
    rows is written for its sake and never read. Rates are set as the optimizer steps, so that what is logged afterwards
    is the step's own.
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
        """Set the rates of the step that is running."""
        self.num_steps = self.running_step() * self.rows_per_step
        super().step(0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing: which schedule a resumed run follows was settled before anything was built."""

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Learning rate of the step that is running."""
        return self.schedule.at(self.running_step())
