"""The request. The only place that decides which of our messages Celery drops before their task: none.

A worker that was told to revoke an id drops every later message with it, also the one that resumes the run.
Of a run, its record says whether it is to go on; `revoke` writes there (`control.py`).
"""

from __future__ import annotations

from celery.worker.request import Request

__all__ = ["RunMessage"]


class RunMessage(Request):  # type: ignore[misc]  # Celery ships no types
    """A message of a run, as a worker has received it."""

    def revoked(self) -> bool:
        """Whether this very message was answered by its termination; nothing else drops it."""
        return bool(self._already_revoked)
