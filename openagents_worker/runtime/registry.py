"""The registry. The only place that knows what a deployment has registered under names that requests may use.

Plugins register when they are imported. Nothing is ever imported because a request says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from openagents_worker.errors import PluginLoadError
from openagents_worker.suggest import did_you_mean

__all__ = ["DEPS", "OUTPUTS", "Registered", "register_deps", "register_output"]

T = TypeVar("T")


class Registered(Generic[T]):
    """Things of one kind by name. Registered again, the last one counts: a test replaces what it fakes."""

    def __init__(self, kind: str, verb: str) -> None:
        self._kind, self._verb = kind, verb
        self._by_name: dict[str, T] = {}

    def add(self, name: str, thing: T) -> None:
        self._by_name[name] = thing

    def get(self, name: str) -> T:
        """What has that name. Raises `PluginLoadError` with a suggestion."""
        if name in self._by_name:
            return self._by_name[name]
        raise PluginLoadError(
            f"no {self._kind} are registered as {name!r}{did_you_mean(name, self._by_name)}",
            hint=f"{self._verb}({name!r}, …) in a module that OPENAGENTS_IMPORTS names",
        )


DEPS: Registered[Callable[[], Any]] = Registered("deps", "register_deps")
OUTPUTS: Registered[type[BaseModel]] = Registered("outputs", "register_output")


def register_deps(name: str, factory: Callable[[], Any]) -> None:
    """Say what `context.deps` is in runs whose request has `deps=name`.

    The factory is called once for each attempt at a run, an async one on the event loop, another one in a
    thread. Where it gives a context manager, async or not, that is entered before the attempt and left after
    it, with the error that ended it. What a factory raises is tried again like a call that failed.

    >>> register_deps("shop", lambda: {"currency": "EUR"})
    """
    DEPS.add(name, factory)


def register_output(name: str, model: type[BaseModel]) -> None:
    """Say what answer is wanted of runs whose request has `output_type=name`.

    >>> class Verdict(BaseModel):
    ...     guilty: bool
    >>> register_output("verdict", Verdict)
    """
    OUTPUTS.add(name, model)
