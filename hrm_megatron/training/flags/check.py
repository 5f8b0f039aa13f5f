"""Check a command line against the table before anything is built; the first invalid flag is refused in one line."""
from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Mapping, Sequence

from hrm_megatron.config import ConfigError
from hrm_megatron.training.flags.bounds import BELOW, BOUNDS
from hrm_megatron.training.flags.table import by_flag
from hrm_megatron.training.flags.verdict import Refused, Used


def given(parser: argparse.ArgumentParser, words: Sequence[str]) -> Iterator[tuple[str, argparse.Action]]:
    """Yield each flag among `words` as it was written, with the parser's action for it."""
    for word in words:
        name = word.partition("=")[0]
        if action := parser._option_string_actions.get(name):
            yield name, action


def check_flags(parser: argparse.ArgumentParser, words: Sequence[str], cuda: bool,
                fixed: Mapping[str, object]) -> None:
    """Raise ConfigError for a flag among `words` that is refused, has no effect or is out of bounds.

    `cuda`: there is a GPU; `fixed`: the settings (by dest) that cannot be changed on this machine.
    """
    defaults, args = vars(parser.parse_args([])), vars(parser.parse_args(words))
    table = by_flag()
    seen: set[str] = set()
    for name, action in given(parser, words):
        if action.dest in seen and action.nargs not in (None, 0, "?"):
            raise ConfigError(f"{name}: is given twice, and only the last would count; write all values behind one")
        seen.add(action.dest)
        value, flag, default = args[action.dest], action.option_strings[0], defaults[action.dest]
        if value in (default, [default]):  # or the default as a list of one
            continue
        written = " ".join([name, *(_written(value) if action.nargs != 0 else ())])
        verdict = table.get(flag)
        if isinstance(verdict, Refused) and value not in verdict.same:
            raise ConfigError(f"{written}: {verdict.why}; {verdict.way_out}")
        if isinstance(verdict, Used):
            _check_used(parser, args, written, value, verdict, cuda)
        if action.dest in fixed and value != fixed[action.dest]:
            raise ConfigError(f"{written}: on this machine, which has no GPU, it can only be {fixed[action.dest]}; "
                              "leave it out")
        _check_bounds(flag, written, value)


def _written(value: object) -> list[str]:
    """Return a value as words on a command line."""
    return [str(getattr(one, "name", one)) for one in (value if isinstance(value, list | tuple) else [value])]


def _check_used(parser: argparse.ArgumentParser, args: Mapping[str, object], written: str, value: object,
                verdict: Used, cuda: bool) -> None:
    if verdict.only and _written(value)[0] not in verdict.only:
        raise ConfigError(f"{written}: choose one of {', '.join(verdict.only)}")
    for condition in verdict.needs.split(", ") if verdict.needs else ():
        flags = condition.split()
        if not any(_is_given(parser, args, *flag.partition("=")) for flag in flags):
            raise ConfigError(f"{written}: has no effect without {' or '.join(flags)}; give that too, or leave it out")
    if verdict.cuda and not cuda:
        raise ConfigError(f"{written}: needs a CUDA device, and there is none; leave it out")
    if verdict.package and importlib.util.find_spec(verdict.package) is None:
        raise ConfigError(f"{written}: needs the Python package {verdict.package}, which is not installed; install it, "
                          "or leave it out")


def _is_given(parser: argparse.ArgumentParser, args: Mapping[str, object], flag: str, _: str, wanted: str) -> bool:
    value = args[parser._option_string_actions[flag].dest]
    return _written(value) == [wanted] if wanted else _is_on(value)


def _is_on(value: object) -> bool:
    """Tell whether a value turns a flag on; for integers, such as parallel sizes, from 2 on."""
    return value > 1 if isinstance(value, int) and not isinstance(value, bool) else bool(value)


def _check_bounds(flag: str, written: str, value: object) -> None:
    if not (bounds := BOUNDS.get(flag)):
        return
    least, most = bounds
    for number in value if isinstance(value, list) else [value]:
        within = float(number) < most if flag in BELOW else float(number) <= most  # type: ignore[arg-type]
        if not (within and least <= float(number)):  # type: ignore[arg-type]  # also refuses NaN
            most_too = f" and {'less than' if flag in BELOW else 'at most'} {most}" if most < float("inf") else ""
            raise ConfigError(f"{written}: must be at least {least}{most_too}")
