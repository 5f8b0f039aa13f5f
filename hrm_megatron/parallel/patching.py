"""Wrap functions of Megatron and temporarily set attributes, where Megatron has no hook or parameter."""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def temporarily(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of a module or an object while the block runs, and restore them afterwards."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def around(stock: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement for `stock` that calls `wrapper(stock, *args, **kwargs)`."""
    return functools.wraps(stock)(functools.partial(wrapper, stock))
