"""Transfers: the only place where another agent may end a run in place of its pattern."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from openagents_worker.errors import ExecutionError, error_from_wire
from openagents_worker.models import RunResult
from openagents_worker.runtime.children import Children
from openagents_worker.runtime.context import AttemptContext
from openagents_worker.runtime.history import RunHistory
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.latch import Latch
from openagents_worker.runtime.original.router import AgentRouter
from openagents_worker.runtime.services import Services
from openagents_worker.runtime.writer import RunWriter

__all__ = ["ended_by_transfer", "give_children", "output_of"]


def give_children(
    context: AttemptContext,
    identity: RunIdentity,
    writer: RunWriter,
    services: Services,
    history: RunHistory,
) -> None:
    """Let the run delegate, also by the router of the original SDK if the agents file says so."""
    children = Children(
        identity,
        context.run_request,
        context.recorder,
        writer=writer,
        services=services,
        spent=history.spent,
    )
    children.cancel_again(history.given_up)
    context.children = children
    if children.is_router:
        context.agent_router = AgentRouter(context)


@contextmanager
def ended_by_transfer(children: Children, latch: Latch) -> Generator[None]:
    """A block that executes a pattern. What it raises after it has transferred the run is dropped."""
    task = asyncio.current_task()
    assert task is not None
    try:
        yield
    except BaseException:  # a task group may have put `RunTransferred` into a group
        if children.transferred is None or latch.reason is not None or task.cancelling():
            raise


def output_of(result: RunResult[Any]) -> Any:
    """The output of the agent to which the run was transferred. Raises its error."""
    if result.ok:
        return result.final_output
    if result.error_details is None:
        raise ExecutionError(f"the run {result.run_id} ended as {result.stop_reason}")
    raise error_from_wire(result.error_details.model_dump(mode="json"))
