"""Pages in Flower: the only place that adds the pages of this library to Flower when it starts.

Celery's command line imports Flower's command before it loads the app, for every command. So Flower's class
is replaced when the app is made, by a function that imports the pages when Flower calls it. The function that
reads the `FLOWER_` variables is replaced in the same way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

__all__ = ["load_flower_with_pages", "show_pages_in_flower"]

FLOWER_COMMAND = "flower.command"
PAGES = "openagents_worker.dashboard.flower_app"


def show_pages_in_flower() -> None:
    """If this process is a command of Celery: make its Flower show our pages for an app with our tasks."""
    command: Any = sys.modules.get(FLOWER_COMMAND)
    if command is not None:
        command.Flower = _flower
        if not hasattr(command.apply_env_options, "__wrapped__"):
            command.apply_env_options = _without_empty_variables(command.apply_env_options)


def load_flower_with_pages() -> None:
    """Import Flower's command, and make it show our pages: for a process in which the app is made first."""
    import_module(FLOWER_COMMAND)
    show_pages_in_flower()


def _flower(**options: Any) -> Any:
    """Flower's application. Its command calls this in the place of the class."""
    return import_module(PAGES).flower_for(**options)


def _without_empty_variables(apply_env_options: Callable[[], None]) -> Callable[[], None]:
    """Flower's function that reads the `FLOWER_` variables, for which an empty one counts as unset.

    Flower ends with a traceback that does not name the variable, for example for `FLOWER_READ_ONLY=`.
    """

    @wraps(apply_env_options)
    def apply() -> None:
        for name in [name for name, value in os.environ.items() if name.startswith("FLOWER_") and not value]:
            del os.environ[name]
        try:
            apply_env_options()
        except ValueError as error:
            from click import UsageError  # Celery imports it only in its own commands

            raise UsageError(f"a variable FLOWER_… has a value that Flower cannot read: {error}") from error

    return apply
