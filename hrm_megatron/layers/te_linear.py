"""Transformer Engine's linear layers, for weights that are used at several ticks of a step.

Names, shapes and checkpoint keys are those of Megatron's local layers, so checkpoints are interchangeable. Importing
this module needs Transformer Engine.

Transformer Engine assumes that a layer runs once per micro-batch, and gives `is_first_microbatch` two meanings: cast
the weight to FP8 again, and *overwrite* `main_grad` in the backward of this very call (pytorch/module/linear.py,
`accumulate_wgrad_into_param_main_grad`). Here a stack's first call of a step may build a graph, and its backward is the
last of the micro-batch: it would overwrite the gradients of the later ticks. So these layers cast by themselves and
never pass that flag as True. Megatron's schedules set it when a step begins (MegatronModule.set_is_first_microbatch),
once for all ticks: of the chunks of a pipeline only chunk 0 owns layers.

Delayed scaling keeps a history of amax values and scales per layer. TransformerBlock.forward enters one FP8 region for
each tick, so a layer runs once in a region, as Transformer Engine demands. A region that builds a graph ends with the
update of all forward scales, its backward with that of all backward scales, both reduced over the data, context and
tensor parallel ranks; a tick without gradient updates nothing, and its amax values enter the next update. Layers of the
other stack then record an amax of zero, which leaves their scale unchanged. A step makes (gradient ticks x
micro-batches) updates, and --fp8-amax-history-len counts these updates, not steps.
"""
from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TELinear, TERowParallelLinear
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fp8_utils import get_fp8_recipe

from hrm_megatron.parallel.main_grad import answer_once

CACHED_WEIGHT = "weight"  # key of the cast weight in Linear.forward's workspaces
SCALING = ("scaling_fwd", "scaling_bwd")
STATE = ("scale", "amax_history")


class TickLinear(TELinear):  # type: ignore[misc]
    """Mixin with the changes to both of Megatron's linear layers."""

    is_first_microbatch: bool

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # As the local layers do: accept a state dict without our extra state as complete.
        self._register_load_state_dict_pre_hook(
            lambda state_dict, prefix, *_: state_dict.setdefault(f"{prefix}_extra_state"))
        if self._scales_are_delayed() and SCALING[0] in self.fp8_meta:
            # FP8 parameters were cast while uninitialized: drop the amax of that memory.
            self.fp8_meta[SCALING[0]].amax_history.zero_()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [..., k/tp of a row-parallel layer] to [..., n/tp of a column-parallel one], and no bias.

        The FP8 copy of the weight left by earlier steps is cast again here, in place. There is none in bf16, in the
        first step of a run, and for FP8 parameters, which the optimizer casts.
        """
        first, self.is_first_microbatch = self.is_first_microbatch, False
        if first and CACHED_WEIGHT in self._fp8_workspaces:
            self._fp8_workspaces[CACHED_WEIGHT].quantize_(self.weight.detach())
        elif first and not torch.is_grad_enabled():
            # Created at a tick without gradient, the copy would lack the transposed weight, and the first tick with
            # gradient would create another: with a newer scale under delayed scaling.
            with torch.enable_grad():
                return super().forward(x.detach().requires_grad_())[0].detach(), None
        out, bias = super().forward(x)
        if self.config.gradient_accumulation_fusion:
            answer_once(out, self.weight)
        return out, bias

    def get_extra_state(self) -> dict[str, torch.Tensor] | None:
        """Return scales and amax histories of delayed scaling, without which a resumed run would start with scales of
        1.

        None in all other cases, like the local layers. Transformer Engine's own extra state is a pickle, which it
        refuses to load.
        """
        if not self._scales_are_delayed() or SCALING[0] not in self.fp8_meta:
            return None
        return {f"{direction}.{name}": getattr(self.fp8_meta[direction], name).detach().to("cpu", copy=True)
                for direction in SCALING for name in STATE}

    def set_extra_state(self, state: dict[str, torch.Tensor] | None) -> None:
        """Restore what `get_extra_state` returned; ignored without delayed scaling."""
        if not state or not self._scales_are_delayed():
            return
        self.fp8_meta["num_gemms"] = 1
        self.init_fp8_meta_tensors(get_fp8_recipe(self.config))
        for direction in SCALING:
            for name in STATE:
                here, there = getattr(self.fp8_meta[direction], name), state[f"{direction}.{name}"]
                if here.shape == there.shape:  # else --fp8-amax-history-len has changed: start anew
                    here.copy_(there)

    def _scales_are_delayed(self) -> bool:
        return bool(self.config.fp8) and self.config.fp8_recipe == "delayed"


class TickColumnParallelLinear(TickLinear, TEColumnParallelLinear):  # type: ignore[misc]
    """Transformer Engine's ColumnParallelLinear."""


class TickRowParallelLinear(TickLinear, TERowParallelLinear):  # type: ignore[misc]
    """Transformer Engine's RowParallelLinear."""


class TickSpecProvider(TESpecProvider):  # type: ignore[misc]
    """Transformer Engine's layers, with our linear ones."""

    def column_parallel_linear(self) -> type:
        return TickColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return TickRowParallelLinear
