"""Keep Megatron's communication/computation overlap both correct and effective while `bp_steps` changes."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.rerun_state_machine import RerunMode, RerunState, get_rerun_state_machine
from megatron.training import training as megatron_training
from megatron.training.global_vars import get_args

from hrm_megatron.layers.compiled import CompiledLayer
from hrm_megatron.training.error_file import RestartableError


class OverlappedReduction:
    """Tells DDP when its expected gradients change (distributed/param_and_grad_buffer.py, _ParamAndGradBucketGroup).

    In the first batch DDP counts how often each gradient of a bucket arrives; from then on it starts to reduce the
    bucket as soon as these counts are reached. The counts and the set of weights with a gradient depend on bp_steps.
    """

    def __init__(self) -> None:
        self.bp_steps: int | None = None

    def before_forward(self, model: torch.nn.Module, bp_steps: int, untrained: torch.Tensor | None) -> None:
        """Prepare DDP for a micro-batch; `untrained` is a weight that will get no gradient in it."""
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


class GradientCheck:
    """Megatron's check for NaN and Inf in the gradients of this rank, with one synchronization per step.

    Stock code reads the norm of each bucket twice before reducing it, in the middle of an overlapped backward, and
    stalls the device each time. Here the norms stay on the device until the gradients are finalized. `judge` is called
    with their sum; by default, a non-finite sum ends the run.
    """

    def __init__(self, judge: Callable[[torch.Tensor], None] | None = None) -> None:
        self.norms: list[torch.Tensor] = []
        self.judge = judge or end_the_run

    def note(self, buckets: list[Any]) -> None:
        """Compute the gradient norms of `buckets`, which are about to be reduced."""
        self.norms += [bucket.grad_data.norm(p=2) for bucket in buckets]

    def read(self) -> None:
        """Call `judge` with the sum of the norms."""
        if self.norms:
            total, self.norms = torch.stack(self.norms).sum(), []  # non-finite if any norm is
            self.judge(total)


def end_the_run(norm: torch.Tensor) -> None:
    """Let Megatron rerun a step whose gradient norm is not finite, and then end the run.

    In the first step of a start raise RestartableError instead: Megatron cannot save before it, and would apply it.
    """
    machine = get_rerun_state_machine()
    first = machine.state == RerunState.INITIAL_RUN and not machine.first_iteration_complete
    if first and machine.mode == RerunMode.VALIDATE_RESULTS and not torch.isfinite(norm):
        raise RestartableError(
            f"step {get_args().iteration + 1}, the first of this start: not taken: gradients on rank "
            f"{torch.distributed.get_rank()} are not finite; if it comes back, look at the data, the rate and the "
            "device, or leave its rows out (--iterations-to-skip, --on-nonfinite skip)")
    machine.validate_result(
        result=norm, rejection_func=lambda norm: not torch.isfinite(norm),
        message="found NaN or Inf in local gradients before data-parallel communication collective",
        tolerance=0.001, fatal=True)  # stock tolerance: attention may sum in another order


def check_gradients_once(check: GradientCheck) -> None:
    """Let DDP note gradient norms, and `check` read them when Megatron's loop finalizes gradients."""
    stock, finalize = _ParamAndGradBucketGroup.check_grads, megatron_training.finalize_model_grads

    def check_grads(self: Any, check_for_nan_or_inf: bool, check_for_large: bool) -> None:
        if check_for_nan_or_inf:
            check.note(self.buckets)
        if check_for_large:
            stock(self, False, True)

    def finalize_model_grads(*arguments: Any, **options: Any) -> None:
        finalize(*arguments, **options)
        check.read()
    _ParamAndGradBucketGroup.check_grads = check_grads
    megatron_training.finalize_model_grads = finalize_model_grads


def gather_before_compiled_layers() -> None:
    """Let DDP wait for all weights of a compiled layer before the layer runs.

    Stock hooks wait at each module inside, so dynamo traces them together with DDP's state, which differs between
    layers: each layer would be compiled separately, up to dynamo's recompile limit.
    """
    stock = DistributedDataParallel.enable_forward_pre_hook

    def enable_forward_pre_hook(self: Any) -> None:
        stock(self)
        wait = self._make_forward_pre_hook()

        def wait_for_all(layer: CompiledLayer, *_: Any) -> None:
            for part in layer.modules():
                wait(part)
        for layer in self.module.modules():
            if isinstance(layer, CompiledLayer):
                for part in layer.modules():
                    self.remove_forward_pre_hook_handles[part].remove()
                self.remove_forward_pre_hook_handles[layer] = layer.register_forward_pre_hook(wait_for_all)
    DistributedDataParallel.enable_forward_pre_hook = enable_forward_pre_hook


def install_overlap(args: argparse.Namespace, judge: Callable[[torch.Tensor], None] | None) -> None:
    """Patch Megatron's DDP as above; `judge` gets the norm of a step's gradients."""
    if args.check_for_nan_in_loss_and_grad:
        check_gradients_once(GradientCheck(judge))
    if args.compile_layers:
        gather_before_compiled_layers()
