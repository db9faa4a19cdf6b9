"""Plugins. The only place that imports an operator's own modules: their tools, patterns and memories."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from openagents_worker.errors import PluginLoadError

__all__ = ["GROUP", "import_from_here", "load_plugins"]

GROUP = "openagents_worker.plugins"
"""Installed packages name modules in this entry-point group to be imported by every worker."""


def import_from_here() -> None:
    """Let modules of the current directory be imported, after all others.

    `celery -A shop worker` finds the app there, and then no longer looks there: a tool of the same project
    that the app does not import itself would not be found.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


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
