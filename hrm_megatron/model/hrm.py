"""The Hierarchical Reasoning Model for text, and its baselines: transformer stacks applied alternately, then one
head."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import TransformerBlock

from hrm_megatron.attention.core import kernel_of
from hrm_megatron.attention.prefix_lm import PrefixSequences
from hrm_megatron.attention.rotary import Rotation
from hrm_megatron.attention.te_attention import check_backend
from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.layers.offload import keep_on_device, offloaded
from hrm_megatron.model.head import LabelHead
from hrm_megatron.model.initialize import draw, initialize, leave_to_checkpoint
from hrm_megatron.model.recurrence import Recorder, Stack, recomputed, run_ticks
from hrm_megatron.model.specs import linear_layers, stack_spec
from hrm_megatron.model.ticks import Tick, ticks_of
from hrm_megatron.parallel.context import context_spans
from hrm_megatron.transformer_config import HRMConfig

STACKS = {"H": "h_stack", "L": "l_stack"}
EMBEDDING_WEIGHT = "embedding.word_embeddings.weight"


class HRMModel(LanguageModule):  # type: ignore[misc]
    """HRM-Text on Megatron-Core (arXiv 2605.20613), or another entry of MODEL_TYPES by `config.arch.model_type`;
    `config.num_layers` counts layers per stack.

    `pre_process` builds the embedding and zL_init, `post_process` the exit norms and the head. Weights are drawn from
    `seed` and their names, so that every parallel layout starts from the same model; with seed None they are NaN until
    a checkpoint is loaded.
    """

    def __init__(self, config: HRMConfig, seed: int | None, pre_process: bool = True, post_process: bool = True,
                 pg_collection: Any = None) -> None:
        super().__init__(config, pg_collection)
        arch = config.arch
        backend = linear_layers(config)
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = False
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, arch.padded_vocab_size, max_sequence_length=0, position_embedding_type="rope",
                tp_group=self.tp_group)
            weight = self.embedding.word_embeddings.weight
            # bf16 in every run, never trained, the same on all ranks (HRM-Text, zL_init).
            if arch.kind.starts_from_z_l:
                self.register_buffer("zL_init", torch.empty(arch.hidden_size, dtype=torch.bfloat16,
                                                            device=weight.device))
        # Virtual pipeline chunks are ticks: each runs all of the stage's layers of one stack.
        block_config = copy.copy(config)
        block_config.virtual_pipeline_model_parallel_size = None
        block_config.cpu_offloading = False  # else each creates the one context that fails here: offload.py
        placements = {"H": arch.h_norm_placement or arch.norm_placement, "L": arch.norm_placement}
        for stack, name in ((stack, STACKS[stack]) for stack in arch.kind.stacks):
            # pre_process=True on every stage: a tick's input is passed as an argument, never through `input_tensor`.
            self.add_module(name, TransformerBlock(
                block_config, stack_spec(block_config, placements[stack], backend), pre_process=True,
                post_process=post_process, pg_collection=self.pg_collection))
        block_config.cpu_offloading = config.cpu_offloading
        if post_process:
            # Labelled positions are gathered before the head, so its input is not sequence-sharded even under SP.
            whole_rows = copy.copy(config)
            whole_rows.sequence_parallel = whole_rows.tp_comm_overlap = False
            self.output_layer = LabelHead(arch.hidden_size, arch.padded_vocab_size, config=whole_rows,
                                          init_method=config.init_method, tp_group=self.tp_group)
        self.setup_embeddings_and_output_layer()
        starts = [self.zL_init] if pre_process and arch.kind.starts_from_z_l else []
        if seed is None:
            leave_to_checkpoint([*self.parameters(), *starts])
            return
        initialize(self.named_global_parameters(), arch, seed, self.tp_group.rank(), self.tp_group.size())
        for start in starts:
            start.copy_(draw(seed, "zL_init", start.shape))

    def _set_attention_backend(self) -> None:
        """Export --attention-backend as environment variables, which only Transformer Engine's kernels read."""
        config = self.config
        kernel = kernel_of(config.attention_kernel, config.params_dtype, config.kv_channels)
        check_backend(kernel, config.attention_backend)
        if kernel == "te":
            super()._set_attention_backend()

    def named_global_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield parameters with their global names (layers numbered over all pipeline stages)."""
        for name, parameter in self.named_parameters():
            parts = name.split(".")
            if parts[0] in STACKS.values():
                parts[2] = str(getattr(self, parts[0]).layers[int(parts[2])].layer_number - 1)
            yield ".".join(parts), parameter

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Ignore the input that Megatron's schedules pass: without pipeline stages the input is the batch."""

    def states(self, batch: PackedBatch, bp_steps: int | None = None, record: Recorder | None = None,
               sequences: PrefixSequences | None = None) -> torch.Tensor:
        """Run all ticks and return the final state, [s/tp under SP, b, h]; `bp_steps` ticks build a graph."""
        x = self.embed(batch)
        if record:
            record("embedding_out", x)
        sequences = sequences or self.sequences(batch)
        return run_ticks(self.ticks(bp_steps), partial(self.stack_of, sequences), z_h=x, z_l=self.first_z_l(x),
                         recompute=self.config.recompute_granularity is not None, record=record)

    def ticks(self, bp_steps: int | None) -> list[Tick]:
        """Return the ticks of one forward pass."""
        return ticks_of(self.config.arch, bp_steps, self.config.recompute_ticks)

    def stack_of(self, sequences: PrefixSequences | None, tick: Tick) -> Stack:
        """Return the stack of `tick` as a function of its input."""
        stack = getattr(self, STACKS[tick.stack])
        if self.config.cpu_offloading and tick.with_grad and not tick.recompute:
            stack = offloaded(stack, self.config.cpu_offloading_num_layers)
        stack = partial(stack, attention_mask=None, packed_seq_params=sequences)
        return recomputed(stack) if tick.recompute else stack

    def embed(self, batch: PackedBatch) -> torch.Tensor:
        """Return the embedded tokens with unit variance, [s/tp under SP, b, h]: the initial z_H."""
        x: torch.Tensor = self.embedding(batch.tokens, batch.position_ids)
        return x * self.config.arch.embedding_scale

    def first_z_l(self, like: torch.Tensor) -> torch.Tensor | None:
        """Return the initial z_L, the same at every position; None if no tick reads it."""
        if not self.config.arch.kind.starts_from_z_l:
            return None
        return self.zL_init.to(like.dtype).expand_as(like)

    def sequences(self, batch: PackedBatch) -> PrefixSequences:
        """Return what attention needs of a micro-batch, shared by all ticks."""
        arch, group = self.config.arch, self.pg_collection.cp
        spans = context_spans(batch.row_tokens, group.rank(), group.size()) if group.size() > 1 else None
        rotation = Rotation.of(batch.position_ids, arch.head_dim, arch.rope_theta)
        if self.config.cpu_offloading:
            keep_on_device(rotation.cos, rotation.sin)
        return PrefixSequences(batch.lengths, rotation, batch.row_tokens, spans)

    def at(self, z_h: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the states [n, h] at positions `index` [n] of the flattened [s, b] rows."""
        if self.config.sequence_parallel:
            z_h = tensor_parallel.gather_from_sequence_parallel_region(
                z_h, tensor_parallel_output_grad=False, group=self.tp_group)
        return z_h.flatten(0, 1)[index]

    def logits_at(self, z_h: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, v/tp] at positions `index` [n] of the flattened [s, b] rows."""
        logits, _ = self.output_layer(self.at(z_h, index).unsqueeze(1))
        return logits.squeeze(1)

    def forward(self, batch: PackedBatch, bp_steps: int | None = None,
                sequences: PrefixSequences | None = None) -> torch.Tensor:
        """Return scores of the labels of `batch`, fp32 [2, n]: cross-entropy, and 1 where the label is the argmax."""
        return self.scores(self.states(batch, bp_steps, sequences=sequences), batch)

    def scores(self, z_h: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Return the scores of the labels from the final state, see `forward`."""
        scores: torch.Tensor = self.output_layer(self.at(z_h, batch.label_index), labels=batch.flat_labels)
        return scores
