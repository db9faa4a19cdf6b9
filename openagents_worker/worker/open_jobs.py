"""Open jobs: the only place that cancels the jobs of tools whose runs have ended.

A run may end while a job that it has started goes on: it is cancelled, also while no worker executes it, or
its time is over. The end does not wait for the service of the job. It is delivered here by the outbox, on any
worker that has the agent, until the tool has cancelled the job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from openagents_worker.errors import RunNotFound
from openagents_worker.models import RunRecord, RunRequest
from openagents_worker.runtime.assembly import AgentParts, Assembly
from openagents_worker.runtime.context import ContextOfRequest
from openagents_worker.runtime.deps import opened_deps
from openagents_worker.runtime.user_code import is_runtime_signal
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.facts import Fact, FactKind
from openagents_worker.store.records import aread_facts, aread_record
from openagents_worker.store.scripts import RunEnd
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.jobs import handle_of
from openagents_worker.tools.toolset import OpenedAtUse

__all__ = ["EndedRunContext", "OpenJobs"]

log = get_logger(__name__)

# Jobs of one run that are being cancelled: one slow service does not use up the time of the others
AT_ONCE = 8


@dataclass(slots=True)
class EndedRunContext(ContextOfRequest):
    """What `cancel_job` sees of a run that has ended. Changes are not stored."""

    run_request: RunRequest
    idempotency_key: str
    """The key with which the job was started."""
    deps: Any = None
    state: dict[str, Any] = field(default_factory=dict)


class OpenJobs:
    """A recipient of the ends of runs. Most ends have no open job: that is one read."""

    name = "open_jobs"

    def __init__(self, store: AsyncStore, assembly: Assembly) -> None:
        self._store, self._assembly = store, assembly

    async def deliver(self, end: RunEnd) -> None:
        """Cancel the jobs of the run that have not ended. Raises an error for a new try."""
        jobs = list((await aread_facts(self._store, end.run_id)).of(FactKind.JOB))
        if not jobs:
            return
        try:
            record = await aread_record(self._store, end.run_id)
        except RunNotFound:
            return
        if record.life != end.life or not record.state.is_terminal or record.request is None:
            return  # it was resumed, and waits for its jobs again
        async with AsyncExitStack() as opened:
            deps = None
            if (name := record.request.deps) is not None:
                in_thread = self._assembly.offload.in_thread
                deps = await opened.enter_async_context(opened_deps(name, in_thread))
            # the run has started its jobs with the definition it began with
            kept = await opened.enter_async_context(
                self._assembly.keeper.of_ended_run(record, own=self._assembly, store=self._store)
            )
            parts = self._assembly.parts(record.agent_id, kept)
            opened.push_async_callback(parts.aclose)
            at_once = asyncio.Semaphore(AT_ONCE)
            cancelling = (_cancel(record, record.request, job, parts, deps, at_once) for job in jobs)
            errors = [error for error in await asyncio.gather(*cancelling) if error is not None]
        if errors:
            raise errors[0] if len(errors) == 1 else BaseExceptionGroup("several jobs", errors)


async def _cancel(
    record: RunRecord,
    request: RunRequest,
    job: Fact,
    parts: AgentParts,
    deps: Any,
    at_once: asyncio.Semaphore,
) -> BaseException | None:
    """Cancel one job. Returns the error for a new try."""
    try:
        note = job.value(run_id=record.run_id)
        tool_id = note.get("tool_id") if isinstance(note, dict) else None
        if not isinstance(tool_id, str):
            return None  # another program has written it
        handle = handle_of(note.get("handle"), tool_id)
        cancel = await _cancellation(parts, tool_id, note.get("toolset_id"))
        if cancel is None:
            log.warning("tool.job_of_removed_tool", run_id=record.run_id, tool_id=tool_id)
            return None
        async with at_once:
            context = EndedRunContext(request, str(note.get("key") or ""), deps)
            was_running = await cancel(handle, context)
    except BaseException as error:
        if is_runtime_signal(error):
            raise
        return error
    log.info(
        "tool.job_cancelled",
        run_id=record.run_id,
        tool_id=tool_id,
        job_id=handle.job_id,
        was_running=bool(was_running),
    )
    return None


async def _cancellation(
    parts: AgentParts, tool_id: str, toolset_id: Any
) -> Callable[..., Awaitable[Any]] | None:
    """How to cancel a job of a tool, or of a tool that a toolset has listed. None: the agent does not have it
    any more."""
    if toolset_id is None:
        tool = parts.single_tools().get(tool_id)
        return None if tool is None else tool.cancel_job
    toolset = parts.toolsets.get(str(toolset_id))
    if not isinstance(toolset, OpenedAtUse) or not toolset.has_jobs:
        return None
    return partial((await toolset.jobs()).cancel_job, tool_id)
