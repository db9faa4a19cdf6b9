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
from contextlib import aclosing
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
MAX_READY_FRAMES = 8  # that a server has not sent yet; a browser that is further behind delays only itself

_Ready = asyncio.Queue[str | Exception | None]


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
    ready: _Ready = asyncio.Queue(MAX_READY_FRAMES)
    following = asyncio.create_task(_follow(handle, after, ready), name=f"sse {handle.id}")
    try:
        while (frame := await _next_frame(ready, following, heartbeat_s)) is not None:
            yield frame
    finally:
        following.cancel()
        await asyncio.wait({following})
    yield f"event: end\ndata: {dumps({'run_id': handle.id})}\n\n"


async def _follow(handle: RunHandle[Any] | AsyncRunHandle[Any], after: int, ready: _Ready) -> None:
    """Put the frames of all events into the queue, then None, or the error that ended the events.

    One task for all events: a task for each event would take several times as long as the event itself.
    """
    try:
        async with aclosing(handle.aevents(after)) as events:
            async for event in events:
                await ready.put(_frame(event))
    except Exception as error:  # noqa: BLE001 - raised by `_next_frame`
        await ready.put(error)
    else:
        await ready.put(None)


async def _next_frame(ready: _Ready, following: asyncio.Task[None], heartbeat_s: float) -> str | None:
    """The next frame, a comment after `heartbeat_s` seconds without one, or None after the last one."""
    if ready.empty():
        try:
            async with asyncio.timeout(heartbeat_s):
                frame = await ready.get()
        except TimeoutError:
            if following.done() and ready.empty():
                following.result()  # the task was cancelled by the event loop, which stops
            return ALIVE
    else:
        frame = ready.get_nowait()
    if isinstance(frame, Exception):
        raise frame
    return frame


def _frame(event: RunEvent) -> str:
    name = " ".join(
        event.name.split()
    )  # the name may come from a tool, and a line end would begin another field
    id_line = "" if event.seq is None else f"id: {event.seq}\n"
    return f"{id_line}event: {name}\ndata: {event.to_json()}\n\n"
