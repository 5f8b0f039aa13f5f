"""Every flag of the pinned Megatron, in its argument groups; a test compares the table with the parser."""
from __future__ import annotations

from hrm_megatron.training.flags import foreign, optimization, parallel, run, storage, transformer
from hrm_megatron.training.flags.verdict import Group, Verdict

OURS = "hrm"  # the group of our own flags, all of which are used

GROUPS: dict[str, Group] = {  # by title in Megatron's parser
    "transformer configuration": transformer.TRANSFORMER,
    "network size": transformer.NETWORK,
    "regularization": optimization.REGULARIZATION,
    "learning rate and weight decay": optimization.LEARNING_RATE,
    "RNG and initialization": optimization.RANDOM,
    "mixed precision": optimization.PRECISION,
    "Transformer-Engine": optimization.TRANSFORMER_ENGINE,
    "training": run.TRAINING,
    "validation": run.VALIDATION,
    "logging": run.LOGGING,
    "checkpointing": storage.CHECKPOINTING,
    "data and dataloader": storage.DATA,
    "tokenizer": storage.TOKENIZER,
    "distributed init": parallel.DISTRIBUTED,
    "profiling": run.PROFILING,
    "experimental": optimization.EXPERIMENTAL,
    "straggler": run.STRAGGLER,
    "workload inspector": run.WORKLOAD_INSPECTOR,
    "one logger": run.ONE_LOGGER,
    "ft_package": run.FT_PACKAGE,
    "rerun engine": run.RERUN,
    "fault injector": run.FAULT_INJECTOR,
    "autoresume": run.AUTORESUME,
    "In-process restart": run.IN_PROCESS_RESTART,
    "msc": storage.MSC,
    "moe": foreign.MOE,
    "mla": foreign.MLA,
    "experimental_attention_variant": foreign.ATTENTION_VARIANT,
    "heterogeneous architecture": foreign.HETEROGENEOUS,
    "Logits Distillation": run.DISTILLATION,
    "inference": foreign.INFERENCE,
    "rl": foreign.RL,
    "sft": foreign.SFT,
    "biencoder": foreign.BIENCODER,
    "vision": foreign.VISION,
}


def by_flag() -> dict[str, Verdict]:
    """Return the verdict of each flag, by the flag's first name."""
    return {flag: verdict for group in GROUPS.values() for verdict in group for flag in verdict.flags.split()}
