"""Classes and functions by name. The only place that imports each of them at its first use.

A worker uses a few of the built-in providers, patterns and tools. To import all of them would delay its first
run, and that of a worker that takes over the runs of a dead one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TypeVar, cast

__all__ = ["LoadedAtUse"]

T = TypeVar("T")


class LoadedAtUse(Mapping[str, T]):
    """A table that imports an entry when it is read for the first time.

    >>> table = LoadedAtUse("openagents_worker", {"suggest": "suggest:did_you_mean"})
    >>> table["suggest"].__name__
    'did_you_mean'
    """

    def __init__(self, package: str, places: Mapping[str, str]) -> None:
        """`places`: the module in the package and the name in it, as `module:name`, by key."""
        self._package = package
        self._places = places
        self._imported: dict[str, T] = {}

    def __getitem__(self, key: str) -> T:
        """The entry. Raises `KeyError` for an unknown key, and `ImportError` if a package is missing."""
        if key not in self._imported:
            module, _, name = self._places[key].partition(":")
            self._imported[key] = cast(T, getattr(import_module(f"{self._package}.{module}"), name))
        return self._imported[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        """Without an import: `Mapping` would read the entry."""
        return key in self._places
