"""Read a YAML file that holds a list of rules."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hrm_megatron.config import ConfigError


def read_rule_list(path: Path, kind: str, shown: str) -> list[Any]:
    """Read a non-empty list; `kind` names the rules in errors, `shown` is the beginning of a rule as an example."""
    try:
        items = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a file of {kind}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(items, list) or not items:
        raise ConfigError(f"{path}: holds {type(items).__name__}, not a list of rules; write one '- {shown}' each")
    return items
