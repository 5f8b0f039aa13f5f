"""Adapt Megatron's parser: printable help, our flags first, and one-line errors."""
from __future__ import annotations

import argparse
import difflib
import functools
import re
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, NoReturn

from hrm_megatron.config import ConfigError
from hrm_megatron.training.flags.table import OURS

UNKNOWN = re.compile(r"unrecognized arguments: (--[^\s=]+)")
UNPRINTABLE = (ValueError, TypeError, KeyError)  # raised by the % operator
UNREADABLE = (LookupError, AssertionError, ArithmeticError, SyntaxError)  # not caught by argparse


class DefaultsShown(argparse.HelpFormatter):
    """Adds the default of each flag, if it has one, to its help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.nargs == 0 or action.default is None
        return action.help if unset else f"{action.help} (default: %(default)s)"


class HelpOfOurs(argparse.Action):
    """Print only our group, with its defaults, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        formatter = DefaultsShown(parser.prog)
        formatter.start_section("flags of hrm_megatron, beside Megatron's (--help, docs/flags.md)")
        formatter.add_arguments(ours(parser)._group_actions)
        formatter.end_section()
        parser._print_message(formatter.format_help(), sys.stdout)
        parser.exit()


def ours(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Return the group of our flags."""
    return next(group for group in parser._action_groups if group.title == OURS)


def prepare(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Put our group first, make all help printable, and turn every error into a one-line ConfigError."""
    ours(parser).add_argument("--help-hrm", action=HelpOfOurs, nargs=0, default=argparse.SUPPRESS,
                              help="show this group alone and exit")
    parser._action_groups.sort(key=lambda group: group.title != OURS)
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help:
            try:
                formatter._expand_help(action)
            except UNPRINTABLE:
                action.help = action.help.replace("%", "%%")
        if isinstance(action.type, FunctionType):
            action.type = _readable(action.type)
    parser.error = functools.partial(_refuse, parser)  # type: ignore[method-assign]
    return parser


def _readable(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap `read` so that argparse reports every value that it cannot parse."""
    @functools.wraps(read)
    def wrapped(text: str) -> Any:
        try:
            return read(text)
        except UNREADABLE as error:
            raise ValueError(text) from error
    return wrapped


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Replace `ArgumentParser.error`, which prints the names of all flags first."""
    if found := UNKNOWN.match(message):
        near = difflib.get_close_matches(found[1], parser._option_string_actions, n=1)
        message += f"; did you mean {near[0]}?" if near else "; --help lists all flags"
    raise ConfigError(f"command line: {message}")
