"""Moved paths. The only place that keeps old import paths of users' settings working for one more release."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["forward"]


def forward(old: str, new: str, names: tuple[str, ...]) -> Callable[[str], Any]:
    """The `__getattr__` of the module `old`: it imports `names` from the module `new`, with a warning."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        warnings.warn(
            f"{old}.{name} has moved to {new}.{name}; the old path will be removed in the next release",
            FutureWarning,
            stacklevel=2,
        )
        return getattr(import_module(new), name)

    return find
