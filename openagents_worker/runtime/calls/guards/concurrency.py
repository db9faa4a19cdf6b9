"""The concurrency: a run makes at most so many calls at once as its executor says."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall, needed_if

__all__ = ["concurrency"]

_is_counted: ContextVar[bool] = ContextVar("openagents_call_is_counted", default=False)


@needed_if(lambda _, run: run.slots is not None)
async def concurrency(call: ToolCall, proceed: Proceed) -> Any:
    """Waits until fewer calls are made. A call inside another one counts with
    it; otherwise it would wait for itself."""
    slots = call.run.slots
    if slots is None or _is_counted.get():
        return await proceed(call)
    if slots.locked():
        with call.run.context.recorder.in_progress.waiting():
            await slots.acquire()
    else:
        await slots.acquire()
    token = _is_counted.set(True)
    try:
        return await proceed(call)
    finally:
        _is_counted.reset(token)
        slots.release()
