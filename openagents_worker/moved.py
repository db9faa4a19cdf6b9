"""Moved paths. The only place that keeps old import paths of users' settings working for one more release."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["forward"]


def forward(old: str, new: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of the module `old`: it imports names from the module `new`, with a warning.

    `names` maps each old name to the new one.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        target = f"{new}.{names[name]}"
        warnings.warn(
            f"{old}.{name} has moved to {target}; the old path will be removed in the next release",
            FutureWarning,
            stacklevel=2,
        )
        return getattr(import_module(new), names[name])

    return find
