"""Sentry. The only place that knows Sentry. It reports failures that no integration of Sentry reports.

Sentry's logging integration reports the log line of a failed run, with the exception of user code. With
`event_level=None` it reports no lines. Then Sentry's Celery integration would not report the failure either,
because the task of a run raises an expected error and not the exception of user code.
"""

from __future__ import annotations

import sys
from typing import Any

from openagents_worker.secret_text import mask_values

__all__ = ["report_unless_logged", "without_secrets"]

MAX_DEPTH = 32  # levels of an event that are masked: the variables of a frame are at the eighth level


def report_unless_logged(error: BaseException | None) -> None:
    """Report the exception of a failed run if Sentry's Celery integration is active and logging is not."""
    sdk: Any = sys.modules.get("sentry_sdk")
    if sdk is None or error is None:
        return
    client = sdk.get_client()
    logging_integration = client.get_integration("logging")
    reports_lines = getattr(logging_integration, "_handler", None) is not None
    if client.get_integration("celery") is not None and not reports_lines:
        sdk.capture_exception(error)


def without_secrets(event: Any, hint: Any = None) -> Any:
    """A `before_send` function for Sentry: masks secrets in an event, including variables of frames.

    Sentry gets the original exception of user code, which is not masked.

    >>> without_secrets({"logentry": {"message": "password=hunter2"}})
    {'logentry': {'message': 'password=***'}}
    """
    return mask_values(event, MAX_DEPTH)
