"""The request. The only place that decides which of our messages Celery drops before their task: none.

A worker that was told to revoke an id or a stamp drops every later message with it, also the one that resumes
the run. Of a run, its record says whether it is to go on; what Celery would drop or end is cancelled there
(`revoke` of an id: `control.py`).
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
        """Whether this very message was answered by its termination; nothing else drops it.

        A run with a revoked stamp is cancelled in its record; the message then tells Celery of its end.
        """
        if revoked_stamps and self._has_revoked_stamp():
            self._cancel_run()
        return bool(self._already_revoked)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Cancel the run; a task of ours that is no run, or is not known yet, ends as Celery ends one."""
        if not self._cancel_run():
            super().terminate(pool, signal)

    def _has_revoked_stamp(self) -> bool:
        for name, value in self.stamps.items():
            revoked = _as_list(revoked_stamps.get(name))
            if any(each in revoked for each in _as_list(value)):
                return True
        return False

    def _cancel_run(self) -> bool:
        """Whether the message is that of a run, which is cancelled then."""
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
