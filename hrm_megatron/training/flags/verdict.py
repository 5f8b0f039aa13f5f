"""What a flag of Megatron's does in a run of ours: one of three verdicts, each over some flags, as plain data."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Used:
    """The flags reach the run: the module `by` reads them.

    They have an effect only beside other flags (`needs`: commas stand between conditions, blanks between flags of which
    one is enough, `--flag=value` asks for that value), where the Python package `package` is installed, and with `cuda`
    on a GPU only. `only` names the values that work, where the parser takes more.
    """

    by: str
    flags: str
    needs: str = ""
    only: tuple[str, ...] = ()
    package: str = ""
    cuda: bool = False


@dataclass(frozen=True)
class Harmless:
    """The flags change nothing, and need not: what they ask for is so in every run of ours. `why` says how."""

    why: str
    flags: str


@dataclass(frozen=True)
class Refused:
    """A run ends before it begins where one of the flags has another value than its default, or than one of `same`.

    The defaults are ours (training.own_flags): what makes a model an HRM is the default of its flag.
    """

    why: str
    flags: str
    way_out: str = "leave it out"
    same: tuple[object, ...] = ()


Verdict = Used | Harmless | Refused
Group = tuple[Verdict, ...]
