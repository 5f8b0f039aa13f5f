"""Put functions around those of Megatron, and give attributes other values for a while where there is no parameter."""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def temporarily(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of a module or an object while the block runs."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def around(stock: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """Return `stock` as `wrapper` calls it, which takes it first."""
    return functools.wraps(stock)(functools.partial(wrapper, stock))
