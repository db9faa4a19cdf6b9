"""Plugins. The only place that imports an operator's own modules: their tools, patterns and memories."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points

from openagents_worker.errors import PluginLoadError

__all__ = ["GROUP", "load_plugins"]

GROUP = "openagents_worker.plugins"
"""Installed packages name modules in this entry-point group to be imported by every worker."""


def load_plugins(modules: Iterable[str]) -> None:
    """Import the modules named in `OPENAGENTS_IMPORTS`, then those of the entry points.

    Raises `PluginLoadError` with the name and, as its cause, what the module raised.
    """
    named = [(name, "OPENAGENTS_IMPORTS") for name in modules]
    found = [(point.value, f"the entry point {point.name!r}") for point in entry_points(group=GROUP)]
    for name, source in (*named, *found):
        try:
            importlib.import_module(name.partition(":")[0])
        except Exception as error:
            raise PluginLoadError(
                f"cannot import {name!r}, named by {source}: {type(error).__name__}: {error}",
                hint="the module must be importable where the worker starts (installed, or on PYTHONPATH)",
            ) from error
