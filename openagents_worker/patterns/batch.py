"""Batches: the only place that makes several tool calls of a program at once (`context.call_tool_batch`).

Each item is a call of its own, with its own record, and passes the same guards as any other call. So after a
crash only the items without a record are made again. One more record closes the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from openagents_worker.errors import (
    ExecutionError,
    OpenAgentsError,
    RequestInvalid,
    StepTooDeep,
    StepTooLarge,
)
from openagents_worker.patterns.base import RunContext
from openagents_worker.patterns.call_groups import GroupedCall, make_calls
from openagents_worker.patterns.tool_calls import emit_failed, unknown_tool

__all__ = ["call_tool_batch"]

MAX_ITEMS = 1_000
"""Of one batch: each item is a task of the event loop and a record of the journal."""


class BatchContext(RunContext, Protocol):
    async def close_batch(self, batch_id: str, tool_ids: Sequence[str], failures: int) -> None: ...


async def call_tool_batch(
    context: BatchContext, requests: Sequence[tuple[str, Mapping[str, Any] | None]]
) -> list[Any]:
    """The results of tool calls, in the order of the requests; see `RunContext.call_tool_batch`."""
    items = _items(requests)
    if not items:
        return []
    tool_ids = [tool_id for tool_id, _ in items]
    batch_id = str(context.uuid4())
    started = {"batch_id": batch_id, "concurrent_count": len(items), "tool_ids": tool_ids}
    await context.emit("tool.batch.started", **started)
    results = await make_calls(
        [
            GroupedCall(partial(_outcome, context, tool_id, params), context.tools.get(tool_id))
            for tool_id, params in items
        ]
    )
    failures = sum(isinstance(result, OpenAgentsError) for result in results)
    await context.close_batch(batch_id, tool_ids, failures)
    return results


async def _outcome(context: RunContext, tool_id: str, params: dict[str, Any]) -> Any:
    """The result of one item, or its error. Errors of the run, for example of its budget, are raised."""
    tool = context.tools.get(tool_id)
    if tool is None:
        return await emit_failed(context, tool_id, unknown_tool(tool_id, sorted(context.tools)))
    try:
        return await tool.invoke(params, context)
    except (StepTooLarge, StepTooDeep) as error:
        return error
    except ExecutionError:
        raise
    except OpenAgentsError as error:
        return error


def _items(requests: Any) -> list[tuple[str, dict[str, Any]]]:
    """The requests of a batch. Raises `RequestInvalid`, naming the first that is not a pair."""
    if not isinstance(requests, Sequence) or isinstance(requests, str | bytes):
        raise _invalid(f"it takes a list, not a {type(requests).__name__}")
    if len(requests) > MAX_ITEMS:
        raise _invalid(f"it has {len(requests):,} items, {MAX_ITEMS:,} are allowed; make several batches")
    return [_item(number, request) for number, request in enumerate(requests)]


def _item(number: int, request: Any) -> tuple[str, dict[str, Any]]:
    match request:
        case (str() as tool_id, None):
            return tool_id, {}
        case (str() as tool_id, params) if isinstance(params, Mapping):
            return tool_id, dict(params)
        case _:
            raise _invalid(f"item {number} is not a pair of a tool id and its arguments")


def _invalid(problem: str) -> RequestInvalid:
    return RequestInvalid(
        f"call_tool_batch: {problem}", hint='for example [("search", {"query": "tea"}), ("search", {})]'
    )
