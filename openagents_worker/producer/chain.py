"""Chains. The only place that knows whether a run that does not exist yet may still come to exist.

The next run of a chain is submitted by the worker that has executed what stands before it. Until then its id
is known to nobody but the handle, and the handle's parent is the result of what stands before it.
"""

from __future__ import annotations

from typing import Any

from celery import states
from celery.backends.base import DisabledBackend
from celery.result import AsyncResult, ResultSet

from openagents_worker.errors import RunNotFound

__all__ = ["may_be_submitted", "raise_failure_before"]


def may_be_submitted(parent: Any) -> bool:
    """Whether this result of a task, a run or a group may still have a run submitted that stands behind it.

    True also where a failure of it keeps the run from ever being submitted: `raise_failure_before` says so.
    """
    from openagents_worker.producer.handle import RunHandle  # handles ask about their parents

    if isinstance(parent, RunHandle):
        try:
            return parent._may_call_next()
        except RunNotFound:
            return False
    if isinstance(parent, ResultSet) or not _is_stored(parent):
        return True  # the last task of a group is stored before what follows the group is submitted
    # Celery sends what follows a task before it stores that the task has succeeded.
    return bool(parent.state != states.SUCCESS)


def raise_failure_before(node: AsyncResult) -> None:
    """Raise what a task, a run or a group of the chain failed with that stands before this one.

    Of tasks whose results are not stored nobody knows whether they have failed.
    """
    before = []
    while (node := node.parent) is not None:
        before.append(node)
    for result in reversed(before):
        for each in result if isinstance(result, ResultSet) else [result]:
            if _is_stored(each):
                each.maybe_throw()


def _is_stored(result: Any) -> bool:
    """Whether it can be known how it ended: a run's record says so, and a result backend."""
    from openagents_worker.producer.handle import RunHandle

    return isinstance(result, RunHandle) or not isinstance(result.backend, DisabledBackend)
