"""What a Megatron flag does in our runs: one of three verdicts, each about some flags, as plain data."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Used:
    """The flags have an effect: the module `by` reads them.

    `needs`: other flags without which they have no effect; commas separate conditions, blanks separate flags of which
    one is enough, and `--flag=value` requires that value. `package`: a Python package that must be installed. `cuda`:
    only on a GPU. `only`: the values that work, if the parser accepts more.
    """

    by: str
    flags: str
    needs: str = ""
    only: tuple[str, ...] = ()
    package: str = ""
    cuda: bool = False


@dataclass(frozen=True)
class Harmless:
    """The flags change nothing, because what they ask for holds in every run; `why` says how."""

    why: str
    flags: str


@dataclass(frozen=True)
class Refused:
    """A start is refused if one of the flags has a value other than its default or one of `same`.

    The defaults are ours (training.own_flags): settings that make the model an HRM are the defaults of their flags.
    """

    why: str
    flags: str
    way_out: str = "leave it out"
    same: tuple[object, ...] = ()


Verdict = Used | Harmless | Refused
Group = tuple[Verdict, ...]
