"""The current folder: the only place that adds the folder in which a command was started to `sys.path`."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["import_from_here"]


def import_from_here(*, first: bool) -> None:
    """Add the current folder to `sys.path`, so that modules of a user's project can be imported.

    `first` puts it at the beginning. An installed command needs this: unlike with `python -m`, the folder is
    not in its path. Celery does the same while it searches for the app of `celery -A shop worker`, and then
    removes the folder again, so that tools in modules that the app does not import would not be found.
    A running worker adds it at the end: then a file of the project cannot hide a module that is loaded later.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0 if first else len(sys.path), here)
