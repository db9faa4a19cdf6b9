"""The lease margin: no tool is called by a worker that may have lost its runs meanwhile."""

from __future__ import annotations

from typing import Any

from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall

__all__ = ["lease_margin"]


async def lease_margin(call: ToolCall, proceed: Proceed) -> Any:
    """Raises `RunLatched` if the lease is over, by the local clock and with a margin for its error."""
    call.run.writer.store.check_lease()
    return await proceed(call)
