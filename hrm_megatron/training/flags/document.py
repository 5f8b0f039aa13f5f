"""Generate docs/flags.md from the table and the parser."""
from __future__ import annotations

import argparse
import importlib.metadata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from hrm_megatron.training.flags.help import ours
from hrm_megatron.training.flags.table import GROUPS
from hrm_megatron.training.flags.verdict import Harmless, Refused, Used, Verdict

COMMAND = "python -m hrm_megatron.training.flags > docs/flags.md"
HEAD = """# Flags

The command line of `hrm_megatron.pretrain` is that of Megatron-Core {version} and a group of our own. Of Megatron's
{total} flags {used} are **used**, {harmless} **harmless**, which ask for what is so in every run, and {refused}
**refused**: with another value than its default such a flag ends the run before it begins, in one line that names flag,
value, reason and way out. A flag that needs another one is refused without it, since it would have no effect.

Defaults are those that `--help` shows; `--help-hrm` shows our group alone. This page is printed from the table by
`{command}`, and a test holds both to the parser.

## Ours

| flag | default | does |
|---|---|---|"""


def document(parser: argparse.ArgumentParser) -> str:
    """Return the page for the installed Megatron-Core, whose parser with our group is `parser`."""
    names = {action.option_strings[0]: action.option_strings for action in parser._actions if action.option_strings}
    counts = Counter(type(verdict) for group in GROUPS.values() for verdict in group for _ in verdict.flags.split())
    lines = [HEAD.format(version=importlib.metadata.version("megatron-core"), total=counts.total(), used=counts[Used],
                         harmless=counts[Harmless], refused=counts[Refused], command=COMMAND)]
    lines += [_our_row(parser, action) for action in ours(parser)._group_actions]
    for title, group in GROUPS.items():
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", "| flags | here | how, or why not |", "|---|---|---|"]
        lines += [_row(verdict, names) for verdict in sorted(group, key=_order)]
    return "\n".join(lines) + "\n"


def _order(verdict: Verdict) -> int:
    return (Used, Harmless, Refused).index(type(verdict))


def _our_row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    silent = action.nargs == 0 or action.default is None
    chosen = f" ({', '.join(action.choices)})" if action.choices else ""
    return f"| `{action.option_strings[0]}` | {'' if silent else f'`{action.default}`'} | {action.help or ''}{chosen} |"


def _row(verdict: Verdict, names: Mapping[str, Sequence[str]]) -> str:
    flags = ", ".join(f"`{name}`" for flag in verdict.flags.split() for name in names[flag])
    return f"| {flags} | {type(verdict).__name__.lower()} | {'; '.join(_reasons(verdict))} |"


def _reasons(verdict: Verdict) -> Iterator[str]:
    if isinstance(verdict, Used):
        yield f"read by `{verdict.by}`"
        if verdict.needs:
            yield "with " + " and ".join(
                " or ".join(f"`{flag}`" for flag in condition.split()) for condition in verdict.needs.split(", "))
        if verdict.only:
            yield f"one of {', '.join(verdict.only)}"
        if verdict.package:
            yield f"with the package {verdict.package}"
        if verdict.cuda:
            yield "on a GPU"
        return
    yield verdict.why
    if isinstance(verdict, Refused):
        yield verdict.way_out
        if verdict.same:
            yield f"{', '.join(map(str, verdict.same))} is as good as leaving it out"
