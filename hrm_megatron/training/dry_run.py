"""`--dry-run`: build a run without weights, GPUs or other ranks; describe its layout, data, memory and disk space."""
from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from hrm_megatron.checkpoint.archive import DamagedError
from hrm_megatron.config import DATA_FLAGS, PRESET_VOCAB_SIZE
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.model import hrm
from hrm_megatron.parallel.patching import temporarily
from hrm_megatron.planner.layout import plan_pipeline, stage_parameters
from hrm_megatron.planner.memory import Memory, Saving, memory_of_stages
from hrm_megatron.training.arguments import layout_of, microbatches_of
from hrm_megatron.training.checkpoint import check_fit, check_start, steps_done
from hrm_megatron.training.checkpoint_space import describe_space
from hrm_megatron.training.data import Sources
from hrm_megatron.training.early_stopping import stopped_early
from hrm_megatron.training.evaluation import Evaluation
from hrm_megatron.training.fsdp import sharded_by_fsdp
from hrm_megatron.training.going_back import describe_return, step_to_go_back_to, went_back
from hrm_megatron.training.layout import describe, gradient_itemsize, layers_of_stages
from hrm_megatron.training.lora import lora_of
from hrm_megatron.training.resume import nothing_left
from hrm_megatron.training.step import TrainingStep, innermost
from hrm_megatron.training.step_schedules import bp_schedule
from hrm_megatron.training.summary import describe_model, describe_schedule
from hrm_megatron.training.verification import stand_ins
from hrm_megatron.transformer_config import architecture_of

log = logging.getLogger(__name__)


def has_data(args: argparse.Namespace) -> bool:
    """Tell whether the command line names data, which a dry run may omit."""
    return any(getattr(args, flag.removeprefix("--").replace("-", "_")) for flag in DATA_FLAGS)


def assumed_vocab_size(args: argparse.Namespace) -> int:
    """Return the vocabulary size of a dry run without data."""
    return int(args.vocab_size or PRESET_VOCAB_SIZE)


@dataclass(frozen=True)
class Built:
    """The weights of one rank, name to (shape, dtype), and its rank in each parallel group."""

    rank: int
    place: dict[str, int]
    weights: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @property
    def parameters(self) -> int:
        """Number of parameters of the model, without adapters."""
        return sum(torch.Size(shape).numel() for name, (shape, _) in self.weights.items() if ".lora." not in name)


@contextlib.contextmanager
def fake_rank(args: argparse.Namespace, rank: int) -> Iterator[None]:
    """Act as one rank of a run without the other ranks: groups know sizes and ranks, but nothing is sent."""
    stock = torch.distributed.new_group

    def new_group(*arguments: Any, **options: Any) -> Any:
        return stock(*arguments, **{**options, "backend": "fake", "pg_options": None})
    torch.distributed.init_process_group("fake", rank=rank, world_size=args.world_size, store=FakeStore())
    try:
        with temporarily(torch.distributed, new_group=new_group):
            parallel_state.initialize_model_parallel(
                args.tensor_model_parallel_size, args.pipeline_model_parallel_size,
                args.virtual_pipeline_model_parallel_size, context_parallel_size=args.context_parallel_size,
                order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp")
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build(args: argparse.Namespace, rank: int) -> Built:
    """Return the model of one rank, built as in a run, but on the meta device."""
    # Build as on a CPU, where Megatron lets torch choose the device; names and shapes are the same for all layers.
    here = argparse.Namespace(**{**vars(args), "use_cpu_initialization": True, "transformer_impl": "local", "fp8": None,
                                 "rank": rank, "cpu_offloading_num_layers": 0})
    without_values = dict(initialize=lambda *_: None, draw=lambda *_: torch.zeros((), device="cpu"))
    with fake_rank(args, rank), temporarily(hrm, **without_values), torch.device("meta"):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        chunk = partial(TrainingStep(here).build_model, pg_collection=groups)
        model = chunk(vp_stage=0) if args.pipeline_model_parallel_size > 1 else chunk()
        assert all(weight.is_meta for weight in model.parameters()), "a weight has values, and would take memory"
        place = {"TP": groups.tp.rank(), "PP": groups.pp.rank(), "CP": groups.cp.rank(),
                 "DP": parallel_state.get_data_parallel_rank()}
        return Built(rank, place, {name: (tuple(weight.shape), args.params_dtype) for name, weight in
                                   innermost(model).named_parameters()})


def first_rank_of(args: argparse.Namespace, stage: int) -> int:
    """Return the lowest rank of a pipeline stage."""
    ranks = args.tensor_model_parallel_size * args.context_parallel_size
    return stage * ranks * (1 if args.use_tp_pp_dp_mapping else int(args.data_parallel_size))


def saving_of(args: argparse.Namespace) -> Saving:
    """Return what a step keeps in memory by these arguments, with a label at every position."""
    return Saving(args.bp_max_steps, args.recompute_ticks, args.recompute_gated_act, args.params_dtype.itemsize,
                  sharded=sharded_by_fsdp(args), lora=lora_of(args), gradient_itemsize=gradient_itemsize(args),
                  # layers under FSDP2 keep no copies, and with FP8 parameters the weights themselves are FP8
                  fp8_copies=bool(args.fp8) and not (args.use_torch_fsdp2 or args.fp8_param_gather))


def predicted_memory(args: argparse.Namespace) -> list[Memory]:
    """Return the predicted GPU memory of each stage, at the maximum number of gradient ticks."""
    plan = None
    if args.pipeline_model_parallel_size > 1:
        plan = plan_pipeline(architecture_of(args, args.vocab_size), args.bp_max_steps, microbatches_of(args),
                             args.pipeline_model_parallel_size, args.pipeline_schedule, args.pipeline_window)
    return memory_of_stages(architecture_of(args, args.vocab_size), layout_of(args), layers_of_stages(args),
                            saving_of(args), plan)


def checked_start(args: argparse.Namespace, data: Sources | None, evaluation: Evaluation) -> tuple[Path | None, int]:
    """Return the checkpoint that the run would load, or None, and the steps done by then; refuse and log what the run
    would.

    The vocabulary is compared only if there are data, and only damage that shows in file sizes is found.
    """
    if (folder := check_start(args)) is None:
        return None, 0
    fits = partial(check_fit, args, evaluation, knows_vocabulary=data is not None)
    try:
        fits(folder)
    except DamagedError as damage:
        if not args.load_newest_valid or step_to_go_back_to(args):
            raise
        for other in stand_ins(folder):
            with contextlib.suppress(DamagedError):
                fits(other)
                log.info(f"checkpoint: {damage}; going on from {other.name}, the newest whose files are whole")
                return other, steps_done(args, other)
        raise
    return folder, steps_done(args, folder)


def describe_dry_run(args: argparse.Namespace, data: Sources | None, evaluation: Evaluation) -> Iterator[str]:
    """Yield the lines of a dry run, after the checks of `pretrain.refuse`; nothing is written."""
    start, done = checked_start(args, data, evaluation)
    yield describe_model(args)
    yield describe(args)
    if args.skip_train:
        yield f"checkpoint: evaluates {start}"
    elif start:
        finished = bool(done and (nothing_left(done, args.train_iters) or stopped_early(args, done)))
        if not finished:  # else the log says so
            yield f"checkpoint: begins from {start}, after step {done}"
        if made := went_back(args):
            yield made
        elif not finished and (step := step_to_go_back_to(args)):
            yield describe_return(args, step)
        if finished:
            done = args.train_iters
    if not args.skip_train and done < args.train_iters:
        yield describe_schedule(argparse.Namespace(**{**vars(args), "iteration": done}), bp_schedule(args))
    architecture = architecture_of(args, args.vocab_size)
    layers, tp = layers_of_stages(args), args.tensor_model_parallel_size
    counts = stage_parameters(architecture, layers)
    last = len(layers) - 1
    for stage in sorted({0, min(1, last), last}):
        built = build(args, first_rank_of(args, stage))
        assert built.place["PP"] == stage and built.parameters * tp == counts[stage], "built otherwise than counted"
        alike = f" to {last - 1} (all alike)" if stage == 1 < last - 1 else ""
        yield f"built: stage {stage}{alike}: {built.parameters:,} weights on each rank in {len(built.weights)} tensors"
    yield from _describe_data(args, data, evaluation, done)
    for memory in predicted_memory(args):
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.parts.items() if size)
        yield f"memory: stage {memory.stage}: {memory.total / 1e9:.2f} GB predicted on each GPU: {parts}"
    if not args.skip_train:
        yield describe_space(args, architecture, done)
    if args.dry_run_rank is not None:
        yield from _describe_rank(build(args, args.dry_run_rank))


def _describe_data(args: argparse.Namespace, data: Sources | None, evaluation: Evaluation, done: int) -> Iterator[str]:
    steps = max(0, args.train_iters - done)
    rows = steps * args.global_batch_size
    wanted = f"{steps} steps of {args.global_batch_size} rows read {rows:,} rows"
    if data is None:
        yield f"data: none given, {args.vocab_size} tokens in the vocabulary assumed; {wanted}"
        return
    if not args.skip_train:
        planned = PackedRows(data.train, args.seq_length, args.seed, max(1, rows))
        yield f"data: training: {planned.describe()}"
        yield f"data: {wanted}, {rows / planned.rows_per_epoch:.2f} epochs"
    for name, walk, read in (("validation", data.valid, evaluation.validates), ("test", data.test, evaluation.tests)):
        if walk and read:
            yield f"data: {name}: {PackedRows(walk, args.seq_length, args.seed, 1, fixed=True).describe()}"


def _describe_rank(built: Built) -> Iterator[str]:
    place = ", ".join(f"{name} {number}" for name, number in built.place.items())
    yield f"rank {built.rank}: {place}; {built.parameters:,} weights"
    for name, (shape, dtype) in built.weights.items():
        yield f"  {name:56} {list(shape)!s:>16} {str(dtype).removeprefix('torch.')}"
