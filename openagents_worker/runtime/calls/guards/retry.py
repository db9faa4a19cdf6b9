"""The retry: a call that failed with a retryable error is made again at once, if the executor says so."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from openagents_worker.agents.executors import RetryOptions
from openagents_worker.errors import ModelRetryError, OpenAgentsError, ToolError
from openagents_worker.runtime.calls.tool_call import BoundTool, Proceed, ToolCall, ToolRun, needed_if
from openagents_worker.runtime.user_code import coded, tool_error

__all__ = ["retry"]


def _may_retry(tool: BoundTool, _: ToolRun) -> bool:
    is_one_request = not tool.is_streaming and not tool.is_background
    return tool.rules.retry is not None and tool.may_repeat and is_one_request


@needed_if(_may_retry)
async def retry(call: ToolCall, proceed: Proceed) -> Any:
    """Makes up to `max_attempts` tries. The state changes of a failed try are dropped.

    Not for a call with effects, whose effect may have happened, and not for a tool that streams. An error
    that asks for a longer pause than `max_delay_ms` is raised: then the run waits, and holds no slot.
    """
    options = call.tool.rules.retry
    if options is None or not call.tool.may_repeat or call.tool.is_streaming:
        return await proceed(call)
    delays: list[int] = []
    reasons: list[str] = []
    while True:
        try:
            return await proceed(call)
        except Exception as raised:
            error = coded(raised, tool_error(ToolError, call.tool_id))
            delay_ms = _delay_ms(options, error, len(delays) + 1)
            if delay_ms is None:
                raise
        delays.append(delay_ms)
        reasons.append(error.code)
        call.executor_metadata = {
            "retry_attempts": len(delays) + 1,
            "retry_delays_ms": delays,
            "retry_reasons": reasons,
        }
        call.context.drop_changes()
        await asyncio.sleep(delay_ms / 1000)


def _delay_ms(options: RetryOptions, error: OpenAgentsError, tries: int) -> int | None:
    """The pause before the next try; None if there is none. Never shorter than the error asks for (P15)."""
    if not error.retryable or isinstance(error, ModelRetryError) or tries >= options.max_attempts:
        return None
    asked_ms = getattr(error, "retry_after_ms", None) or 0
    if asked_ms > options.max_delay_ms:
        return None
    full = min(options.initial_delay_ms * options.backoff_multiplier ** (tries - 1), options.max_delay_ms)
    random_part = {"none": 0.0, "equal": 0.5, "full": 1.0}[options.jitter]
    return max(round(full * (1 - random_part * random.random())), asked_ms)  # no secret
