"""The concurrency: a run makes at most so many calls at once as its executor says."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall, needed_if

__all__ = ["concurrency"]

_counted: ContextVar[frozenset[int]] = ContextVar("openagents_counted_calls", default=frozenset())
"""The limits in which the call that is being made counts, by the ids of their semaphores."""


@needed_if(lambda tool, run: run.slots is not None or tool.slots is not None)
async def concurrency(call: ToolCall, proceed: Proceed) -> Any:
    """Waits until fewer calls are made: of the run, or of the tool if it has an executor of its own. A call
    inside another one counts with it; otherwise it would wait for itself."""
    slots = call.tool.slots or call.run.slots
    counted = _counted.get()
    if slots is None or id(slots) in counted:
        return await proceed(call)
    if slots.locked():
        with call.run.context.recorder.in_progress.waiting():
            await slots.acquire()
    else:
        await slots.acquire()
    token = _counted.set(counted | {id(slots)})
    try:
        return await proceed(call)
    finally:
        _counted.reset(token)
        slots.release()
