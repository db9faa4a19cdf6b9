"""Plugins. The only place that imports an operator's own modules: their tools, patterns and memories."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points

from openagents_worker.errors import PluginLoadError, text_of

__all__ = ["GROUP", "import_plugins", "load_plugins"]

GROUP = "openagents_worker.plugins"
"""Installed packages name modules in this entry-point group to be imported by every worker."""


def load_plugins(modules: Iterable[str]) -> None:
    """Import the modules named in `OPENAGENTS_IMPORTS`, then those of the entry points.

    Raises `PluginLoadError` that names each that cannot be imported, and what it raised.
    """
    errors = import_plugins(modules)
    if len(errors) > 1:
        message = "; ".join(error.message for error in errors)
        raise PluginLoadError(message, hint=errors[0].hint) from errors[0].__cause__
    for error in errors:
        raise error


def import_plugins(modules: Iterable[str]) -> list[PluginLoadError]:
    """Import the same modules; an error for each that cannot be imported, whose cause is what it raised."""
    errors = []
    named = [(name, "OPENAGENTS_IMPORTS") for name in modules]
    found = [(point.value, f"the entry point {point.name!r}") for point in entry_points(group=GROUP)]
    for name, source in (*named, *found):
        try:
            importlib.import_module(name.partition(":")[0])
        except Exception as error:  # noqa: BLE001 - a module may raise anything when it is imported
            failed = PluginLoadError(
                f"cannot import {name!r}, named by {source}: {type(error).__name__}: {text_of(error)}",
                hint="the module must be importable where the worker starts (installed, or on PYTHONPATH)",
            )
            failed.__cause__ = error
            errors.append(failed)
    return errors
