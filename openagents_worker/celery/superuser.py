"""Superuser: the only place that says, in one line of the log, that a worker has the rights of root.

Celery decides whether it has. Celery itself says it in ten lines, before the log is set up.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from celery.exceptions import SecurityWarning
from celery.platforms import check_privileges

from openagents_worker.telemetry.logs import get_logger

__all__ = ["log_superuser", "silence_celery"]

log = get_logger(__name__)


def silence_celery() -> None:
    """Hide Celery's own warning in this process. `log_superuser` says the same later."""
    warnings.filterwarnings("ignore", category=SecurityWarning)


def log_superuser(app: Any) -> None:
    """Log a warning if this process is root, or in a group in which Celery advises against running a worker.

    These are `sudo`, `wheel`, and groups without a name.
    """
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", SecurityWarning)
        check_privileges(app.conf.accept_content)
    if found:
        log.warning(
            "worker.superuser",
            uid=os.geteuid(),
            gid=os.getegid(),
            hint="tools have the rights of the worker: run it as another user, as the image does",
        )
