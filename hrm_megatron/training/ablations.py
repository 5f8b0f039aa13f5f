"""Flags that each disable one of HRM-Text's design choices, to measure its effect."""
from __future__ import annotations

import argparse

from hrm_megatron.config import ATTENTION_GATES, ATTENTION_MASKS, PREFIX_LM, SIGMOID, ConfigError


def add_ablations(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--attention-mask", choices=ATTENTION_MASKS, default=PREFIX_LM,
                       help="who sees whom within an example: the prefix both ways, or all causally (an ablation)")
    group.add_argument("--attention-gate", choices=ATTENTION_GATES, default=SIGMOID,
                       help="what multiplies attention's result, or none of it (an ablation)")
    group.add_argument("--adamw", action="store_true",
                       help="update by AdamW's quotient, with epsilon 1e-8, in place of atan2 (an ablation)")
    group.add_argument("--loss-on-prefix", action="store_true",
                       help="learn the tokens of prefixes too, not only responses, also in validation (an ablation)")


def check_ablations(args: argparse.Namespace) -> None:
    """Refuse a loss on tokens that the attention mask reveals."""
    if args.loss_on_prefix and args.attention_mask == PREFIX_LM:
        raise ConfigError("--loss-on-prefix: in PrefixLM each token of a prefix sees the next one, which it would be "
                          "asked for; give --attention-mask causal too, or leave it out")
