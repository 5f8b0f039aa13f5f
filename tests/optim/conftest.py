from __future__ import annotations

from types import SimpleNamespace

import pytest

from hrm_megatron.data.batch import PackedBatch

ROWS = dict(tokens="inputs", labels="labels", position_ids="position_ids", prefix_lengths="prefix_lens",
            response_lengths="causal_lens")
SHARDING = dict(distrib_optim_sharding_type="fully_reshardable", distrib_optim_fully_reshardable_mem_efficient=False,
                singleton_local_shards=False, chained_optim_avoid_prefix=True)


@pytest.fixture(scope="session")
def reference_batch():
    """Read one packed row of the reference, whose tensors begin with `prefix`."""
    def read(tensors: dict, prefix: str) -> PackedBatch:
        return PackedBatch.from_rows({ours: tensors[prefix + theirs].long()[None] for ours, theirs in ROWS.items()})
    return read


@pytest.fixture(scope="session")
def trainer(single_rank):
    """Put a model (with `calculate_per_token_loss`) into Megatron's DDP, its distributed optimizer and schedule."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from hrm_megatron.model.ticks import ticks_of, trains_embedding
    from hrm_megatron.optim.builder import StepScheduler, build_optimizer
    from hrm_megatron.training.metrics import loss_sums

    def build(model, schedule, weight_decay=0.1, ema_decay=0.9, betas=(0.9, 0.95), rows_per_step=1):
        sharded_optimizer = DistributedDataParallelConfig(use_distributed_optimizer=True)
        ddp = DistributedDataParallel(model.config, sharded_optimizer, model)
        model.model_type = ModelType.encoder_or_decoder  # the loop's get_model sets it
        model.config.finalize_model_grads_func = finalize_model_grads
        now = SimpleNamespace(bp_steps=0, step=0)
        optimizer = build_optimizer(
            OptimizerConfig(optimizer="adam", lr=schedule.lr, min_lr=schedule.min_lr, weight_decay=weight_decay,
                            adam_beta1=betas[0], adam_beta2=betas[1], clip_grad=0.0, use_distributed_optimizer=True),
            [ddp], ema_decay, lambda: trains_embedding(ticks_of(model.config.arch, now.bp_steps)))
        scheduler = StepScheduler(optimizer, schedule, rows_per_step, weight_decay, lambda: now.step)

        def forward_step(batches, ddp):
            batch = next(batches)
            return ddp(batch=batch, bp_steps=now.bp_steps), lambda scores: loss_sums(batch, scores)

        def step(batches, bp_steps):
            """Train one step on micro-batches, as Megatron's train_step does; return the mean loss."""
            now.bp_steps, now.step = bp_steps, now.step + 1
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            reports = get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=iter(batches), model=[ddp],
                num_microbatches=len(batches), seq_length=batches[0].tokens.shape[1], micro_batch_size=1,
                forward_only=False)
            assert optimizer.step()[0]
            scheduler.step(rows_per_step)
            total, count = sum(report["lm loss"] for report in reports).tolist()
            return total / count

        def sharded(is_loading=False):
            """Megatron's sharded state: the model's and the optimizer's."""
            metadata = dict(SHARDING, dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            weights = model.sharded_state_dict(metadata=metadata)
            return dict(model=weights, optimizer=optimizer.sharded_state_dict(weights, is_loading, metadata=metadata))

        def state():
            """Optimizer state by Megatron's names: "param.NAME", "exp_avg.NAME" ..., full tensors."""
            parts = [part for parts in sharded()["optimizer"]["param_state"].values() for part in parts.values()]
            return {part.key.removeprefix("optimizer.state."): part.data for part in parts}

        def groups():
            """Parameter groups of the one torch optimizer: (the layers' and the head's, the embedding's)."""
            (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
            return tuple(sorted(part.optimizer.param_groups, key=lambda group: bool(group.get("is_embedding"))))

        return SimpleNamespace(now=now, model=model, optimizer=optimizer, scheduler=scheduler, step=step,
                               sharded=sharded, state=state, groups=groups)
    return build
