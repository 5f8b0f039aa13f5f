"""Which generations of flash-attn are installed. Each is imported: a build for another torch fails only then."""
from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FUNCTION = "flash_attn_varlen_func"
# The arguments that we pass by name; q, k and v are the first positional ones in every generation.
NAMES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "deterministic")
# Generation to the package that states its version, and the modules that may contain the function. (flash_attn.cute
# states version 0.0.0; containers that copy the file of generation 3 put it into the second module.)
PACKAGES = {
    2: ("flash-attn", ("flash_attn",)),
    3: ("flash-attn-3", ("flash_attn_interface", "flash_attn_3.flash_attn_interface")),
    4: ("flash-attn-4", ("flash_attn.cute",)),
}
LEFT_OUT = "FLASHATTENTION_DISABLE_"


@dataclass(frozen=True)
class FlashAttn:
    """An installed generation: its version (None if it states none) and the module with its function.

    `fault` says why it cannot be used on any machine. `left_out` lists the features that its build disabled, by the
    names in flash-attn's setup.py ("BACKWARD", "HDIM64", ...).
    """

    generation: int
    version: str | None
    module: str = ""
    fault: str | None = None
    left_out: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{PACKAGES[self.generation][0]} {self.version or 'of no stated version'}"

    def function(self) -> Callable[..., Any]:
        """Return its flash_attn_varlen_func."""
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), FUNCTION)
        return found


@functools.cache
def installed_flash_attn() -> tuple[FlashAttn, ...]:
    """Return all installed generations; cached per process."""
    return tuple(found for found in map(find, PACKAGES) if found)


def find(generation: int) -> FlashAttn | None:
    """Return one generation, or None if it is not installed.

    One without a version whose parent package fails, which is another generation's, counts as not installed.
    """
    package, modules = PACKAGES[generation]
    version, fault = _version(package), None
    for name in modules:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # third-party compiled code can fail in any way
            absent = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
            if not absent and (version or not _fails_in_parent(name)):
                fault = f"its import fails ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
            continue
        if (function := getattr(module, FUNCTION, None)) is None:
            continue
        version = version or getattr(module, "__version__", None)
        known = inspect.signature(function).parameters
        unknown = [wanted for wanted in NAMES if wanted not in known]
        fault = f"its {FUNCTION} has no parameter {unknown[0]}" if unknown else None
        return FlashAttn(generation, version, name, fault, _left_out() if generation == 3 else frozenset())
    if fault is None and version is not None:  # such as flash-attn-3 0.0.0 on PyPI
        fault = f"it is a placeholder without {FUNCTION}"
    return FlashAttn(generation, version, fault=fault) if fault else None


def _fails_in_parent(name: str) -> bool:
    """Tell whether the import of a module that has failed did so in the package around it."""
    parent = name.rpartition(".")[0]
    return bool(parent) and parent not in sys.modules


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _left_out() -> frozenset[str]:
    try:
        flags = importlib.import_module("flash_attn_config").CONFIG["build_flags"]
    except (ImportError, AttributeError, KeyError):
        return frozenset()  # builds before 2025 have no such module
    return frozenset(name.removeprefix(LEFT_OUT) for name, value in flags.items()
                     if value and name.startswith(LEFT_OUT))
