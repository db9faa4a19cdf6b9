"""The interruption: a tool that must not be interrupted ends before a cancellation takes effect."""

from __future__ import annotations

import asyncio
from typing import Any

from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall, needed_if

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
            await asyncio.wait([working], timeout=0 if recorder.is_latched else LONGEST_BLOCK_S)
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)  # its outcome is dropped
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            task.cancel()  # the cancellation takes effect once the outcome is recorded
            return working.result()
