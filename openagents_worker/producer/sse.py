"""Server-Sent Events. The only place that turns a run's events into what a browser's EventSource reads.

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

HEARTBEAT_S = 15.0  # proxies close a connection that says nothing for half a minute or more
MAX_DIGITS = 18  # of an event's number: with more it is none that Redis takes
ALIVE = ": alive\n\n"


def sse(
    handle: RunHandle[Any] | AsyncRunHandle[Any],
    last_event_id: str | int | None = None,
    *,
    heartbeat_s: float = HEARTBEAT_S,
) -> AsyncGenerator[str]:
    """A run's events as frames: `id:` its number, `event:` its name, `data:` the event as JSON.

    What is live only, a piece of a reply above all, has no id. `last_event_id` is the header `Last-Event-ID`
    as it came: the frames go on after it, without gap or double. The last frame is `event: end`; the page
    closes its EventSource then, or the browser would ask again. After `heartbeat_s` without a frame comes a
    comment. Raises `RequestInvalid` at once for an id that is none of ours, and `TooManyWatchers` where
    `OPENAGENTS_MAX_WATCHERS` are open in this process; one is open from its first frame on. `RunNotFound`
    comes with the first frame, so a server that wants a 404 asks for `handle.record()` before.
    """
    after = _after(last_event_id)
    check_watcher_limit(handle._client.settings.max_watchers)
    return _frames(handle, after, heartbeat_s)


def _after(last_event_id: str | int | None) -> int:
    text = text_of(last_event_id or "0").strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        raise RequestInvalid(
            f"Last-Event-ID is the number of an event, not {text[:40]!r}", hint="leave it out to begin again"
        )
    return int(text)


async def _frames(
    handle: RunHandle[Any] | AsyncRunHandle[Any], after: int, heartbeat_s: float
) -> AsyncGenerator[str]:
    async with aclosing(handle.aevents(after)) as events:
        over = False
        while not over:
            async with _next(events, handle.id) as coming:
                while not (await asyncio.wait({coming}, timeout=heartbeat_s))[0]:
                    yield ALIVE
                event = coming.result()
            over = event is None
            if event is not None:
                yield _frame(event)
    yield f"event: end\ndata: {dumps({'run_id': handle.id})}\n\n"


@asynccontextmanager
async def _next(
    events: AsyncGenerator[RunEvent], run_id: str
) -> AsyncGenerator[asyncio.Task[RunEvent | None]]:
    """A task that waits for the next event; None: there is none. It ends with the block, whatever happens."""

    async def following() -> RunEvent | None:
        return await anext(events, None)

    coming = asyncio.create_task(following(), name=f"sse {run_id}")
    try:
        yield coming
    finally:
        coming.cancel()
        await asyncio.wait({coming})


def _frame(event: RunEvent) -> str:
    name = " ".join(event.name.split())  # a tool may have named it; a line end would begin another field
    id_line = "" if event.seq is None else f"id: {event.seq}\n"
    return f"{id_line}event: {name}\ndata: {event.to_json()}\n\n"
