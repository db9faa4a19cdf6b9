"""The current folder. The only place that lets modules be imported from where a command was started."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["import_from_here"]


def import_from_here(*, first: bool) -> None:
    """Let modules of the current folder be imported: for whoever imports somebody's code.

    An installed command, unlike `python -m`, does not look there; it wants it `first`, as `celery` does
    while it looks for the app of `celery -A shop worker`. Then Celery looks there no more: a tool of the
    project that the app does not import itself would not be found. In a worker that runs it comes last, so
    that a file of the project takes the place of no module that is loaded later.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0 if first else len(sys.path), here)
