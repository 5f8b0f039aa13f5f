"""Refuse values that are incompatible with each other or with the disk in one line, instead of Megatron's traceback."""
from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from hrm_megatron.config import ConfigError, refuse_beside
from hrm_megatron.parallel.simulate import AUTO, STOCK
from hrm_megatron.planner.layout import check_rows
from hrm_megatron.training.heartbeats import BACKSTOP

FOLDERS = ("save", "load", "pretrained_checkpoint", "tensorboard_dir", "wandb_save_dir", "data_cache_path",
           "sampled_data_path")
FILES = ("nccl_communicator_config_path",)
MULTIPLES = {"save_retain_interval": "save_interval", "log_memory_interval": "log_interval"}


def check_values(args: argparse.Namespace, cuda: bool) -> None:
    """Refuse errors that no single flag shows; `cuda`: there is a GPU."""
    for name in FOLDERS:
        if getattr(args, name) == "":
            raise ConfigError(f"{_flag(name)} '': is empty; name a folder, or leave it out")
        if (place := getattr(args, name)) and Path(place).is_file():
            raise ConfigError(f"{_flag(name)} {place}: a file is there; name a folder")
    for name in FILES:
        if (place := getattr(args, name)) and not Path(place).is_file():
            raise ConfigError(f"{_flag(name)} {place}: no such file; correct the path")
    refuse_beside("--ddp-num-buckets", {"--ddp-bucket-size": args.ddp_num_buckets and args.ddp_bucket_size})
    if args.init_std is not None and args.init_scheme == "lecun_normal" and not args.use_checkpoint_args:
        raise ConfigError(f"--init-std {args.init_std}: has no effect with --init-scheme lecun_normal; give "
                          "--init-scheme fixed_normal or megatron too, or leave it out")
    refuse_beside("--bf16", {"--fp16": args.bf16 and args.fp16})
    refuse_beside("--train-iters", {"--train-samples": args.train_iters and args.train_samples})
    refuse_beside("--lr-decay-iters", {"--train-samples (count in steps: --train-iters)":
                                       args.lr_decay_iters and args.train_samples})
    refuse_beside("--grad-reduce-in-bf16", {"--accumulate-allreduce-grads-in-fp32":
                                            args.grad_reduce_in_bf16 and args.accumulate_allreduce_grads_in_fp32})
    refuse_beside("--save-params-interval", {"--overlap-param-gather (weights are not gathered right behind a step)":
                                             args.save_params_interval and args.overlap_param_gather})
    for warmup, others in (("--lr-warmup-fraction", ("lr_warmup_iters", "lr_warmup_samples")),
                           ("--train-samples", ("lr_warmup_iters",))):
        if getattr(args, _dest(warmup)):
            refuse_beside(warmup, {_flag(other): getattr(args, other) for other in others})
    for name, unit in MULTIPLES.items():
        if (interval := getattr(args, name)) and interval % getattr(args, unit):
            raise ConfigError(f"{_flag(name)} {interval}: is no multiple of {_flag(unit)} {getattr(args, unit)}; "
                              "choose one")
    _check_recomputation(args)
    _check_hang_timeout(args)
    if args.most_recent_k and not args.save:
        raise ConfigError(f"--most-recent-k {args.most_recent_k}: has no effect without --save; give that too")
    if args.wandb_project and not (args.wandb_save_dir or args.save):
        raise ConfigError(f"--wandb-project {args.wandb_project}: there is no folder for its files; give --save or "
                          "--wandb-save-dir")
    if args.wandb_project and args.wandb_exp_name == "":
        raise ConfigError(f"--wandb-project {args.wandb_project}: --wandb-exp-name is empty; give the run a name, or "
                          "leave that flag out")
    if args.profile and not args.use_pytorch_profiler and not cuda:
        raise ConfigError("--profile: Nsight Systems needs a CUDA device, and there is none; add "
                          "--use-pytorch-profiler")
    if args.async_save and args.async_strategy == "nvrx" and not importlib.util.find_spec("nvidia_resiliency_ext"):
        raise ConfigError("--async-save: --async-strategy nvrx needs the Python package nvidia-resiliency-ext, which "
                          "is not installed; install it, or give --async-strategy mcore")


def _check_recomputation(args: argparse.Namespace) -> None:
    if args.recompute_granularity == "full" and not (args.recompute_method and args.recompute_num_layers):
        raise ConfigError("--recompute-granularity full: say which layers; give --recompute-method and "
                          "--recompute-num-layers, or --recompute-ticks in its place")
    if args.recompute_granularity == "selective":
        refuse_beside("--recompute-granularity selective", {"--recompute-method": args.recompute_method,
                                                            "--recompute-num-layers": args.recompute_num_layers})


def _check_hang_timeout(args: argparse.Namespace) -> None:
    """Refuse a timeout that other timeouts precede, and one without a folder for its files."""
    if args.hang_timeout_minutes is None:
        return
    flag = f"--hang-timeout-minutes {args.hang_timeout_minutes:g}"
    if not args.save:
        raise ConfigError(f"{flag}: ranks tell each other where they are by files in --save; give that too")
    if args.hang_timeout_minutes * BACKSTOP >= args.distributed_timeout_minutes:
        raise ConfigError(f"{flag}: the collectives end the run after --distributed-timeout-minutes "
                          f"{args.distributed_timeout_minutes}, before a silent rank is named; give more than "
                          f"{args.hang_timeout_minutes * BACKSTOP:g} there, or less here")


def check_profile(args: argparse.Namespace) -> None:
    """Refuse a profile that would never be written; call it once ranks and steps are known."""
    if not args.profile:
        return
    first, last = args.profile_step_start, args.profile_step_end
    if args.skip_train:
        raise ConfigError("--profile: has no effect with --skip-train; leave one of them out")
    if last <= first:
        raise ConfigError(f"--profile-step-end {last}: must be more than --profile-step-start {first}; give more")
    if args.train_iters and last > args.train_iters:
        raise ConfigError(f"--profile-step-end {last}: the profile is written there, and the run ends at step "
                          f"{args.train_iters}; give less, or train longer")
    for rank in args.profile_ranks:
        if not 0 <= rank < args.world_size:
            raise ConfigError(f"--profile-ranks {rank}: no such rank; choose among 0 to {args.world_size - 1}")


def check_batch(args: argparse.Namespace) -> None:
    """Refuse batches of training or evaluation that cannot be divided into micro-batches on all replicas."""
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    replicas = args.world_size // ranks
    for prefix in ("", "eval_"):
        rows = getattr(args, f"{prefix}global_batch_size") or args.global_batch_size
        micro = getattr(args, f"{prefix}micro_batch_size") or args.micro_batch_size
        check_rows(rows, micro, replicas, prefix.replace("_", "-"))
    step = args.global_batch_size or args.micro_batch_size * replicas
    if args.train_samples and args.train_samples < step:
        raise ConfigError(f"--train-samples {args.train_samples}: is less than one step of {step} rows "
                          f"(--global-batch-size); give at least {step}")


def check_pipeline_flags(args: argparse.Namespace) -> None:
    """Refuse pipeline flags that have no effect in this layout."""
    given = {"--pipeline-window": args.pipeline_window,
             "--pipeline-schedule": None if args.pipeline_schedule == AUTO else args.pipeline_schedule,
             "--decoder-first-pipeline-num-layers": args.decoder_first_pipeline_num_layers,
             "--decoder-last-pipeline-num-layers": args.decoder_last_pipeline_num_layers}
    for flag, value in given.items():
        if value is not None and args.pipeline_model_parallel_size == 1:
            raise ConfigError(f"{flag} {value}: has no effect without a pipeline; give "
                              "--pipeline-model-parallel-size, or leave it out")
    if args.pipeline_window and args.pipeline_schedule == STOCK:
        raise ConfigError(f"--pipeline-window {args.pipeline_window}: has no effect with --pipeline-schedule {STOCK}, "
                          "which has one phase; leave one of them out")


def check_evaluation(args: argparse.Namespace) -> None:
    """Refuse evaluations with fewer micro-batches than pipeline stages, which several ticks require."""
    if not (args.eval_iters or args.full_validation):
        return
    stages = args.pipeline_model_parallel_size
    replicas = args.world_size // (args.tensor_model_parallel_size * stages * args.context_parallel_size)
    unit = (args.eval_micro_batch_size or args.micro_batch_size) * replicas
    rows = args.eval_global_batch_size or args.global_batch_size or unit
    if rows // unit < stages:
        whole = "no --full-validation" if args.full_validation else "--eval-iters 0"
        raise ConfigError(f"evaluations of {rows} rows: {rows // unit} micro-batches on each replica are fewer than "
                          f"the {stages} pipeline stages; give --eval-global-batch-size {stages * unit} or more, a "
                          f"smaller --eval-micro-batch-size, or {whole}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
