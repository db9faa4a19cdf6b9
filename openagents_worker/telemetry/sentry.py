"""Sentry. The only place that knows of it, and gives it what none of its integrations sees.

Its logging integration reports the line of a failed run, with the exception of user code. Where that is told
to report no lines (`event_level=None`), its Celery integration would report nothing either: what a run's task
raises is an expected error, and not the exception of user code.
"""

from __future__ import annotations

import sys
from typing import Any

from openagents_worker.secret_text import mask_values

__all__ = ["report_unless_logged", "without_secrets"]

DEEPEST = 32  # levels of Sentry's events: the variables of a frame lie in the eighth


def report_unless_logged(error: BaseException | None) -> None:
    """Report what a run failed with, where Sentry watches Celery's tasks and not the log."""
    sdk: Any = sys.modules.get("sentry_sdk")
    if sdk is None or error is None:
        return
    client = sdk.get_client()
    logs = client.get_integration("logging")
    reports_lines = logs is not None and getattr(logs, "_handler", None) is not None
    if client.get_integration("celery") is not None and not reports_lines:
        sdk.capture_exception(error)


def without_secrets(event: Any, hint: Any = None) -> Any:
    """A `before_send` of Sentry: what looks like a secret is masked in an event, its frames' variables too.

    Sentry gets the exception of user code itself, and not what this library makes of it.

    >>> without_secrets({"logentry": {"message": "password=hunter2"}})
    {'logentry': {'message': 'password=***'}}
    """
    return mask_values(event, DEEPEST)
