"""Worker requests: the only place that keeps Celery from dropping a message of a run before its task.

A worker that has got a `revoke` of an id or a stamp drops every later message with it, also one that resumes
the run. The record of a run decides whether it continues. So a message that Celery would drop cancels the run
in its record instead (`revoke` of an id: `celery/revoke.py`).
"""

from __future__ import annotations

from typing import Any

from celery.exceptions import InvalidTaskError
from celery.worker.request import Request
from celery.worker.state import revoked_stamps

from openagents_worker.errors import RedisUnreachable, RequestInvalid, RunNotFound
from openagents_worker.producer.client import client_of
from openagents_worker.producer.publisher import RESUME_RUN, RUN_AGENT
from openagents_worker.telemetry.logs import get_logger

__all__ = ["RunMessage"]

log = get_logger(__name__)


class RunMessage(Request):  # type: ignore[misc]  # Celery ships no types
    """A received message of a run."""

    def __init__(self, message: Any, **options: Any) -> None:
        """Raises `InvalidTaskError` for malformed arguments, which Celery would find only inside its
        tracer."""
        super().__init__(message, **options)
        embedded = () if self._decoded else message.payload[2:]
        if not isinstance(self._args, list | tuple) or not isinstance(self._kwargs, dict):
            raise InvalidTaskError("args must be a list, and kwargs must be an object")
        if any(not isinstance(part, dict) for part in embedded):
            raise InvalidTaskError("the part of the body after args and kwargs must be an object")

    def revoked(self) -> bool:
        """Whether this message was already terminated and reported; no other message is dropped.

        A run with a revoked stamp is cancelled in its record; its message then reports the end to Celery.
        """
        if revoked_stamps and self._has_revoked_stamp():
            self._cancel_run()
        return bool(self._already_revoked)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Cancel the run. A task that is not an accepted run is terminated by Celery."""
        if not self._cancel_run():
            super().terminate(pool, signal)

    def _has_revoked_stamp(self) -> bool:
        for name, value in self.stamps.items():
            revoked = _as_list(revoked_stamps.get(name))
            if any(each in revoked for each in _as_list(value)):
                return True
        return False

    def _cancel_run(self) -> bool:
        """Cancel the run of this message; returns False if the message does not belong to an accepted run."""
        if self.name not in (RUN_AGENT, RESUME_RUN):
            return False
        try:
            answer = client_of(self.app).cancel(self.id, "revoked")
        except (RunNotFound, RequestInvalid):
            return False
        except RedisUnreachable as error:
            log.warning("revoke.redis_away", ids=[self.id], error=error.message)
        else:
            log.info("run.revoked", run_id=self.id, answer=answer.value)
        return True


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
