"""A stream of a run as chunks. The only place that translates events to the pieces of the original SDK."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, closing
from typing import Any

from openagents_worker.events import RunEvent
from openagents_worker.models import ChunkKind, RunResult, RunStreamChunk

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


class ChunkMaker:
    """Makes the chunks of one run from its events after number `after`."""

    def __init__(self, run_id: str, after: int) -> None:
        self._last = RunStreamChunk(kind=ChunkKind.RUN_FINISHED, run_id=run_id, sequence=after)
        """Where and when the last event was: the chunks after the last event repeat it."""

    def of_event(self, event: RunEvent) -> RunStreamChunk | None:
        """The chunk of the next event; None if it has none."""
        self._last = RunStreamChunk(
            kind=ChunkKind.RUN_FINISHED,
            run_id=event.run_id,
            session_id=event.session_id,
            agent_id=event.agent_id,
            sequence=self._last.sequence if event.seq is None else event.seq,
            timestamp_ms=round(event.timestamp.timestamp() * 1000),
        )
        kind = KIND_OF_EVENT.get(event.name)
        return (
            None if kind is None else self._last.model_copy(update={"kind": kind, "payload": event.payload})
        )

    def at_end(self, result: RunResult[Any]) -> list[RunStreamChunk]:
        """The chunks after the last event: one for each artifact, then the result."""
        artifacts = [
            self._last.model_copy(
                update={"kind": ChunkKind.ARTIFACT, "payload": artifact.model_dump(mode="json")}
            )
            for artifact in result.artifacts
        ]
        return [*artifacts, self._last.model_copy(update={"result": result})]


def chunks_of(
    run_id: str, after: int, events: Generator[RunEvent], wait: Callable[[], RunResult[Any]]
) -> Generator[RunStreamChunk]:
    """The chunks of these events, and of the result for which `wait` waits after them."""
    chunks = ChunkMaker(run_id, after)
    with closing(events):
        for event in events:
            if (chunk := chunks.of_event(event)) is not None:
                yield chunk
    yield from chunks.at_end(wait())


async def achunks_of(
    run_id: str, after: int, events: AsyncGenerator[RunEvent], wait: Callable[[], Awaitable[RunResult[Any]]]
) -> AsyncGenerator[RunStreamChunk]:
    """`chunks_of` for asyncio."""
    chunks = ChunkMaker(run_id, after)
    async with aclosing(events):
        async for event in events:
            if (chunk := chunks.of_event(event)) is not None:
                yield chunk
    for chunk in chunks.at_end(await wait()):
        yield chunk
