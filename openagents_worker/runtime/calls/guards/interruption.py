"""The interruption: a tool that must not be interrupted ends before a cancellation takes effect."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall, needed_if
from openagents_worker.runtime.recorder import Recorder

__all__ = ["LONGEST_BLOCK_S", "interruption"]

LONGEST_BLOCK_S = 10.0  # a run that is cancelled waits so long for such a tool; its limits hold as well


@needed_if(lambda tool, _: tool.spec.interrupt_behavior == "block" and not tool.is_background)
async def interruption(call: ToolCall, proceed: Proceed) -> Any:
    """Lets the call end first if its task is cancelled, and records its outcome. Its timeout holds.

    After `LONGEST_BLOCK_S`, it is cancelled like any other call. If the run stops, `stopping` has waited.
    """
    recorder = call.run.context.recorder

    async def work() -> Any:
        return await proceed(call)

    with recorder.in_progress.blocking():
        working = asyncio.create_task(work(), name=f"blocking {call.info.call_id}")
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            if working.cancelled():
                raise
            await _wait_at_most(working, LONGEST_BLOCK_S, recorder)
            if not working.done():
                working.cancel()
                while not working.done():  # its outcome is dropped
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([working])
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            task.cancel()  # the cancellation takes effect once the outcome is recorded
            return working.result()


async def _wait_at_most(working: asyncio.Task[Any], seconds: float, recorder: Recorder) -> None:
    """Wait until the task has ended, also while the current one is cancelled again: otherwise the tool would
    go on behind the back of its run. A run that stops has waited before."""
    loop = asyncio.get_running_loop()
    ends_at_s = loop.time() + seconds
    while not working.done():
        left_s = 0.0 if recorder.is_latched else max(0.0, ends_at_s - loop.time())
        with suppress(asyncio.CancelledError):
            await asyncio.wait([working], timeout=left_s)
        if left_s == 0:
            return
