"""Sampling rules of HRM-Text's data pipeline: how many examples each source file gives to an epoch.

A rules file is a YAML list. For a source the first rule applies whose `prefix` its name starts with: `max_per_file`
examples per epoch (default: all), `repeat` times over; longer examples than the context are truncated or dropped
(`long_context`).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.rule_file import read_rule_list

LONG_CONTEXT = ("truncate", "drop")
MIN_RESPONSE_TOKENS = 2  # one token of content, and the end token

Lengths = np.ndarray  # [n] tokens of prefixes or of targets


@dataclass(frozen=True)
class Rule:
    """The settings for sources whose names start with `prefix`."""

    prefix: str = ""
    max_per_file: int | None = None
    repeat: int = 1
    long_context: str = LONG_CONTEXT[0]

    def per_epoch(self, eligible: int) -> int:
        """Return how many examples a source with this many eligible ones gives to an epoch."""
        return min(eligible, eligible if self.max_per_file is None else self.max_per_file) * self.repeat

    def eligible(self, prefixes: Lengths, targets: Lengths, context_tokens: int) -> np.ndarray:
        """Return whether each example takes part, bool [n]; prefix and target may have `context_tokens` together."""
        room = context_tokens - prefixes.astype(np.int64)
        fits = room >= 1 if self.long_context == "truncate" else targets <= room
        return np.asarray(fits & (targets >= MIN_RESPONSE_TOKENS))


@dataclass(frozen=True)
class Rules:
    """Rules in order, and the file that they come from."""

    path: Path
    rules: tuple[Rule, ...]

    def assign(self, names: Sequence[str], each_has_effect: bool = True) -> list[Rule]:
        """Return the rule of each source; a source without one is taken as it is. With `each_has_effect`, refuse a rule
        that applies to none of the sources."""
        chosen: list[Rule] = []
        shadowed: dict[Rule, Rule] = {}
        for name in names:
            fitting = [rule for rule in self.rules if name.startswith(rule.prefix)]
            chosen.append(fitting[0] if fitting else Rule())
            shadowed |= {rule: fitting[0] for rule in fitting[1:]}
        for number, rule in enumerate(self.rules, start=1):
            if each_has_effect and rule not in chosen:
                if rule in shadowed:
                    raise ConfigError(f"{self.path}: rule {number}, prefix {rule.prefix!r}: all its sources are taken "
                                      f"by the rule of prefix {shadowed[rule].prefix!r} before it; put it first")
                raise ConfigError(f"{self.path}: rule {number}, prefix {rule.prefix!r} matches none of the sources "
                                  f"{_listed(names)}; correct or remove it")
        return chosen

    def check_sizes(self, chosen: Sequence[Rule], sizes: Sequence[int], row_tokens: int) -> None:
        """Refuse a rule whose sources have no eligible example; `chosen` and `sizes` are by source."""
        for number, rule in enumerate(self.rules, start=1):
            if not sum(size for one, size in zip(chosen, sizes, strict=True) if one == rule):
                raise ConfigError(f"{self.path}: rule {number}, prefix {rule.prefix!r}: none of its examples is left "
                                  f"to train on: prefixes fill rows of {row_tokens} tokens, or --split takes all; "
                                  "raise --seq-length, or remove the rule and its sources")


def _listed(names: Sequence[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def read_rules(path: str | Path) -> Rules:
    """Read and check a file of rules; a ConfigError names the rule, the key and its value."""
    path = Path(path)
    items = read_rule_list(path, "sampling rules", "prefix: NAME")
    rules = tuple(_rule(f"{path}: rule {number}", item) for number, item in enumerate(items, start=1))
    for number, rule in enumerate(rules, start=1):
        if rule.prefix in [earlier.prefix for earlier in rules[:number - 1]]:
            raise ConfigError(f"{path}: rule {number}, prefix {rule.prefix!r}: there is one before it; remove one")
    return Rules(path, rules)


def _rule(place: str, item: Any) -> Rule:
    if not isinstance(item, dict) or not isinstance(item.get("prefix"), str):
        raise ConfigError(f"{place}: {item!r} has no prefix; name the sources, for example prefix: \"flan\"")
    known = [field.name for field in fields(Rule)]
    for key, value in item.items():
        if key not in known:
            raise ConfigError(f"{place}: unknown key {key!r}; there are {', '.join(known)}")
        if key == "long_context" and value not in LONG_CONTEXT:
            raise ConfigError(f"{place}: long_context {value!r}; give {' or '.join(LONG_CONTEXT)}")
        if key in ("max_per_file", "repeat") and not (key == "max_per_file" and value is None) and (
                type(value) is not int or value < 1):
            raise ConfigError(f"{place}: {key} {value!r} is no number of at least 1; to leave sources out, do not give "
                              "them as data")
    return Rule(**item)
