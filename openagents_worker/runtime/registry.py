"""The registry: the only place that holds what a deployment has registered under names for requests.

Plugins register when they are imported. A request never causes an import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from openagents_worker.errors import PluginLoadError
from openagents_worker.suggest import did_you_mean

__all__ = ["DEPS", "OUTPUTS", "NamedRegistry", "register_deps", "register_output"]

T = TypeVar("T")


class NamedRegistry(Generic[T]):
    """Objects of one kind by name. A second registration replaces the first, so that tests can use fakes."""

    def __init__(self, kind: str, verb: str) -> None:
        self._kind, self._verb = kind, verb
        self._by_name: dict[str, T] = {}

    def add(self, name: str, value: T) -> None:
        self._by_name[name] = value

    def get(self, name: str) -> T:
        """The object with this name. Raises `PluginLoadError` with a suggestion."""
        if name in self._by_name:
            return self._by_name[name]
        raise PluginLoadError(
            f"no {self._kind} are registered as {name!r}; {did_you_mean(name, sorted(self._by_name))}",
            hint=f"{self._verb}({name!r}, …) in a module that OPENAGENTS_IMPORTS names",
        )


DEPS: NamedRegistry[Callable[[], Any]] = NamedRegistry("deps", "register_deps")
OUTPUTS: NamedRegistry[type[BaseModel]] = NamedRegistry("outputs", "register_output")


def register_deps(name: str, factory: Callable[[], Any]) -> None:
    """Register the value of `context.deps` for runs whose request has `deps=name`.

    The factory is called once per attempt: an async function on the event loop, any other in a thread. If it
    returns a context manager, async or not, the manager is entered before the attempt and exited after it,
    with the error that ended it. If the factory raises an error, the run is retried like after a failed call.

    >>> register_deps("shop", lambda: {"currency": "EUR"})
    """
    DEPS.add(name, factory)


def register_output(name: str, model: type[BaseModel]) -> None:
    """Register the output type of runs whose request has `output_type=name`.

    >>> class Verdict(BaseModel):
    ...     guilty: bool
    >>> register_output("verdict", Verdict)
    """
    OUTPUTS.add(name, model)
