"""Server-Sent Events. The only place that formats the events of a run for the EventSource of a browser.

```python
@app.get("/runs/{run_id}/events")
async def follow(run_id: str, last_event_id: Annotated[str | None, Header()] = None) -> StreamingResponse:
    frames = sse(client.handle(run_id), last_event_id)
    return StreamingResponse(frames, media_type="text/event-stream")
```
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from openagents_worker.errors import RequestInvalid, text_of
from openagents_worker.events import RunEvent
from openagents_worker.jsontext import dumps
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
from openagents_worker.store.watchers import check_watcher_limit

__all__ = ["sse"]

HEARTBEAT_S = 15.0  # proxies close a connection that is silent for half a minute or more
MAX_DIGITS = 18  # of the number of an event; Redis does not accept more
ALIVE = ": alive\n\n"


def sse(
    handle: RunHandle[Any] | AsyncRunHandle[Any],
    last_event_id: str | int | None = None,
    *,
    heartbeat_s: float = HEARTBEAT_S,
) -> AsyncGenerator[str]:
    """The events of a run as SSE frames: `id:` is the number, `event:` the name, `data:` the event as JSON.

    Events that are only sent live, such as pieces of a reply, have no id. `last_event_id` is the value of the
    header `Last-Event-ID`: the frames continue after it, without gaps or duplicates. The last frame is
    `event: end`. The page must close its EventSource then, because otherwise the browser connects again.
    After `heartbeat_s` seconds without a frame, a comment is sent.

    Raises `RequestInvalid` at once for an invalid id, and `TooManyWatchers` if this process already has
    `OPENAGENTS_MAX_WATCHERS` watchers; a watcher counts from its first frame. `RunNotFound` is raised with
    the first frame: to answer with 404, a server calls `handle.record()` before.
    """
    after = _parsed_last_event_id(last_event_id)
    check_watcher_limit(handle.connection.publishing.settings.max_watchers)
    return _frames(handle, after, heartbeat_s)


def _parsed_last_event_id(last_event_id: str | int | None) -> int:
    """The number of the event after which the frames continue. Raises `RequestInvalid`."""
    text = text_of(last_event_id or "0").strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        raise RequestInvalid(
            f"Last-Event-ID must be the number of an event, not {text[:40]!r}",
            hint="leave it out to start with the first event",
        )
    return int(text)


async def _frames(
    handle: RunHandle[Any] | AsyncRunHandle[Any], after: int, heartbeat_s: float
) -> AsyncGenerator[str]:
    async with aclosing(handle.aevents(after)) as events:
        has_ended = False
        while not has_ended:
            async with _next_event_task(events, handle.id) as next_event:
                while not (await asyncio.wait({next_event}, timeout=heartbeat_s))[0]:
                    yield ALIVE
                event = next_event.result()
            has_ended = event is None
            if event is not None:
                yield _frame(event)
    yield f"event: end\ndata: {dumps({'run_id': handle.id})}\n\n"


@asynccontextmanager
async def _next_event_task(
    events: AsyncGenerator[RunEvent], run_id: str
) -> AsyncGenerator[asyncio.Task[RunEvent | None]]:
    """A task that waits for the next event; its result is None after the last one. The block ends the
    task."""

    async def following() -> RunEvent | None:
        return await anext(events, None)

    next_event = asyncio.create_task(following(), name=f"sse {run_id}")
    try:
        yield next_event
    finally:
        next_event.cancel()
        await asyncio.wait({next_event})


def _frame(event: RunEvent) -> str:
    name = " ".join(
        event.name.split()
    )  # the name may come from a tool, and a line end would begin another field
    id_line = "" if event.seq is None else f"id: {event.seq}\n"
    return f"{id_line}event: {name}\ndata: {event.to_json()}\n\n"
