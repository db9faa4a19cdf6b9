"""A stream of a run as chunks. The only place that translates events to the pieces of the original SDK."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, closing
from enum import Enum
from typing import Any

from openagents_worker.events import RunEvent
from openagents_worker.models import ChunkKind, RunResult, RunStreamChunk
from openagents_worker.store.client import AsyncStore, Plan, Store
from openagents_worker.store.plan import Emit

__all__ = ["achunks_of", "chunks_of"]

KIND_OF_EVENT = {
    "session.run.started": ChunkKind.RUN_STARTED,
    "llm.delta": ChunkKind.LLM_DELTA,
    "llm.succeeded": ChunkKind.LLM_FINISHED,
    "tool.called": ChunkKind.TOOL_STARTED,
    "tool.delta": ChunkKind.TOOL_DELTA,
    "tool.succeeded": ChunkKind.TOOL_FINISHED,
    "tool.failed": ChunkKind.TOOL_FINISHED,
    "validation.retry": ChunkKind.VALIDATION_RETRY,
    "run.checkpoint_saved": ChunkKind.CHECKPOINT_SAVED,
    "run.resume_attempted": ChunkKind.RESUME_ATTEMPTED,
    "run.resume_succeeded": ChunkKind.RESUME_SUCCEEDED,
}
"""All other events have no chunk."""


class _StreamStep(Enum):
    """The steps of the plan of a stream: what it needs from its caller."""

    EVENT = "event"
    """The next event of the run; None after the last one."""
    RESULT = "result"
    """The result of the run, which has ended."""


def _chunks(run_id: str, after: int) -> Plan[None]:
    """The chunks of the events after number `after`, then one for each artifact, and the result."""
    # Where and when the last event was: the chunks after the last event repeat it.
    last = RunStreamChunk(kind=ChunkKind.RUN_FINISHED, run_id=run_id, sequence=after)
    event: RunEvent | None
    while (event := (yield _StreamStep.EVENT)) is not None:
        last = RunStreamChunk(
            kind=ChunkKind.RUN_FINISHED,
            run_id=event.run_id,
            session_id=event.session_id,
            agent_id=event.agent_id,
            sequence=last.sequence if event.seq is None else event.seq,
            timestamp_ms=round(event.timestamp.timestamp() * 1000),
        )
        if (kind := KIND_OF_EVENT.get(event.name)) is not None:
            yield Emit([last.model_copy(update={"kind": kind, "payload": event.payload})])
    result: RunResult[Any] = yield _StreamStep.RESULT
    for artifact in result.artifacts:
        shown = {"kind": ChunkKind.ARTIFACT, "payload": artifact.model_dump(mode="json")}
        yield Emit([last.model_copy(update=shown)])
    yield Emit([last.model_copy(update={"result": result})])


def chunks_of(
    store: Store, run_id: str, after: int, events: Generator[RunEvent], wait: Callable[[], RunResult[Any]]
) -> Generator[RunStreamChunk]:
    """The chunks of these events, and of the result for which `wait` waits after them."""
    execute = {_StreamStep.EVENT: lambda: next(events, None), _StreamStep.RESULT: wait}
    with closing(events):
        yield from store.stream(_chunks(run_id, after), lambda step: execute[step]())


async def achunks_of(
    store: AsyncStore,
    run_id: str,
    after: int,
    events: AsyncGenerator[RunEvent],
    wait: Callable[[], Awaitable[RunResult[Any]]],
) -> AsyncGenerator[RunStreamChunk]:
    """`chunks_of` for asyncio."""
    execute = {_StreamStep.EVENT: lambda: anext(events, None), _StreamStep.RESULT: wait}
    plan = _chunks(run_id, after)
    async with aclosing(events), aclosing(store.stream(plan, lambda step: execute[step]())) as chunks:
        async for chunk in chunks:
            yield chunk
