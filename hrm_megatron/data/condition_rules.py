"""Assign conditions by rules: tags for rows without a condition of their own, chosen by patterns in their texts.

A rules file is a YAML list. The first rule whose patterns all match applies; a rule without patterns matches every row.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.rule_file import read_rule_list
from hrm_megatron.data.spelling import tags_of

PATTERNS = ("instruction", "response")
KEYS = ("condition", *PATTERNS)


@dataclass(frozen=True)
class ConditionRule:
    """A condition (tags), and the regular expressions that must match somewhere in instruction and response."""

    condition: str
    instruction: str = ""
    response: str = ""

    def fits(self, instruction: str, response: str) -> bool:
        return bool(re.search(self.instruction, instruction) and re.search(self.response, response))


def condition_by_rule(rules: Iterable[ConditionRule], instruction: str, response: str) -> str | None:
    """Return the condition of the first rule that matches, or None."""
    return next((rule.condition for rule in rules if rule.fits(instruction, response)), None)


def read_condition_rules(path: Path, known_tags: Iterable[str]) -> tuple[ConditionRule, ...]:
    """Read and check a file of rules; a ConfigError names the rule, the key and its value."""
    items = read_rule_list(path, "rules for conditions", "condition: TAGS")
    rules = tuple(_rule(f"{path}: rule {number}", item, tuple(known_tags))
                  for number, item in enumerate(items, start=1))
    for number, rule in enumerate(rules[:-1], start=1):
        if not rule.instruction and not rule.response:
            raise ConfigError(f"{path}: rule {number} fits every row, so that those behind it have no effect; put it "
                              "last")
    return rules


def _rule(place: str, item: Any, known_tags: tuple[str, ...]) -> ConditionRule:
    if not isinstance(item, dict) or not isinstance(item.get("condition"), str):
        raise ConfigError(f"{place}: {item!r} has no condition; write condition: TAGS, or '' for none")
    for key, value in item.items():
        if key not in KEYS:
            raise ConfigError(f"{place}: unknown key {key!r}; there are {', '.join(KEYS)}")
        if not isinstance(value, str):
            raise ConfigError(f"{place}: {key} {value!r} is no text; put it in quotes")
    try:
        tags_of(item["condition"], known_tags)
        for key in PATTERNS:
            re.compile(item.get(key, ""))
    except (ConfigError, re.error) as error:
        raise ConfigError(f"{place}: {error}; correct it") from error
    return ConditionRule(**item)
