"""The request. The only place that decides which of our messages Celery drops before their task: none.

A worker that was told to revoke an id drops every later message with it, also the one that resumes the run.
Of a run, its record says whether it is to go on; `revoke` writes there (`control.py`).
"""

from __future__ import annotations

from typing import Any

from celery.exceptions import InvalidTaskError
from celery.worker.request import Request

__all__ = ["RunMessage"]


class RunMessage(Request):  # type: ignore[misc]  # Celery ships no types
    """A message of a run, as a worker has received it."""

    def __init__(self, message: Any, **how: Any) -> None:
        """Raises `InvalidTaskError` for arguments that Celery would meet in the middle of its tracer only."""
        super().__init__(message, **how)
        embedded = () if self._decoded else message.payload[2:]
        if not isinstance(self._args, list | tuple) or not isinstance(self._kwargs, dict):
            raise InvalidTaskError("args is no list, or kwargs is no object")
        if any(not isinstance(part, dict) for part in embedded):
            raise InvalidTaskError("what is embedded beside args and kwargs is no object")

    def revoked(self) -> bool:
        """Whether this very message was answered by its termination; nothing else drops it."""
        return bool(self._already_revoked)
