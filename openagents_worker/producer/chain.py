"""Chains. The only place that decides whether the next run of a chain can still be submitted.

A worker submits the next run of a chain after the previous task or run has ended. Until then only the handle
knows the id of the run. The parent of the handle is the result of the previous task or run.
"""

from __future__ import annotations

from typing import Any

from celery import states
from celery.backends.base import DisabledBackend
from celery.result import AsyncResult, ResultSet

from openagents_worker.errors import RunNotFound

__all__ = ["RunResultInChain", "may_be_submitted", "raise_failure_before"]


class RunResultInChain(AsyncResult):  # type: ignore[misc]  # Celery ships no types
    """Base class of the handle of a run: its outcome is in the record of the run."""

    def may_call_next(self) -> bool:
        """Whether the next task of the chain may still be called. It is also true for a run that failed.

        Raises `RunNotFound`.
        """
        raise NotImplementedError


def may_be_submitted(parent: Any) -> bool:
    """Whether the run after this task, run or group (`parent`) may still be submitted.

    It is also true if a failure prevents the submission: `raise_failure_before` raises that failure.
    """
    if isinstance(parent, RunResultInChain):
        try:
            return parent.may_call_next()
        except RunNotFound:
            return False
    if isinstance(parent, ResultSet) or not _is_stored(parent):
        return True  # the result of a group is stored before its next task is submitted
    # Celery sends the next task before it stores the success of this one.
    return bool(parent.state != states.SUCCESS)


def raise_failure_before(node: AsyncResult) -> None:
    """Raise the failure of a task, run or group before this one in the chain.

    Failures of tasks without a stored result cannot be found.
    """
    predecessors = []
    while (node := node.parent) is not None:
        predecessors.append(node)
    for predecessor in reversed(predecessors):
        for result in predecessor if isinstance(predecessor, ResultSet) else [predecessor]:
            if _is_stored(result):
                result.maybe_throw()


def _is_stored(result: Any) -> bool:
    """Whether the outcome is stored: in the record of a run, or in a result backend."""
    return isinstance(result, RunResultInChain) or not isinstance(result.backend, DisabledBackend)
