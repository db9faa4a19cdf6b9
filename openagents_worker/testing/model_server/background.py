"""Responses in the background: the only place that generates a reply without a connected client.

`POST /v1/responses` with `background: true` starts one. `GET /v1/responses/{id}` returns its state, or with
`stream=true&starting_after=N` the events after number N. `POST /v1/responses/{id}/cancel` ends it.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from openagents_worker.testing.model_server.answers import BeforePiece, RequestLog
from openagents_worker.testing.model_server.connection import ClientConnection, ReceivedRequest
from openagents_worker.testing.model_server.openai_responses import (
    OpenAIResponsesFormat,
    response,
    response_id,
)
from openagents_worker.testing.model_server.wire_format import Event, Reply

__all__ = ["BackgroundResponse", "BackgroundResponses"]

MAX_STORED = 1000  # the oldest ones are forgotten, so that a long test does not fill the memory


class BackgroundResponse:
    """One response: the events so far, and its state."""

    def __init__(self, wire: OpenAIResponsesFormat, reply: Reply, *, failure: str | None) -> None:
        """`failure`: the response fails with this message in the middle."""
        self.id = response_id(reply)
        self.status = "queued"
        self.events: list[Event] = []
        self._wire, self._reply, self._failure = wire, reply, failure
        self._changed = asyncio.Condition()

    @property
    def ended(self) -> bool:
        return self.status not in ("queued", "in_progress")

    def state(self) -> dict[str, Any]:
        """The response as it is now."""
        failure = self._failure or "failed" if self.status == "failed" else None
        return response(self._reply, self.status, failure)

    async def generate(self, latency_s: float, before_piece: BeforePiece) -> None:
        """Generate the events one by one."""
        events = self._wire.events(self._reply)
        if self._failure is not None:
            half = events[: len(events) // 2]
            events = [*half, self._wire.failed_event(self._reply, self._failure, len(half))]
        await self._add(_with_status(events[0], "queued"), "queued")
        await asyncio.sleep(latency_s)
        for number, event in enumerate(events[1:-1]):
            await before_piece(self._reply.request, number)
            await self._add(event, "in_progress")
        await self._add(events[-1], json.loads(events[-1].data)["response"]["status"])

    async def cancel(self) -> None:
        """End the response, unless it has ended. It has no output then."""
        if not self.ended:
            self.status = "cancelled"
            async with self._changed:
                self._changed.notify_all()

    async def _add(self, event: Event, status: str) -> None:
        if self.status == "cancelled":
            return
        async with self._changed:
            self.events.append(event)
            self.status = status
            self._changed.notify_all()

    async def follow(self, after: int = -1) -> AsyncIterator[Event]:
        """The events with a number above `after`, until the response has ended."""
        at = after + 1
        while True:
            for event in self.events[at:]:
                yield event
                at += 1
            if self.ended and at >= len(self.events):
                return
            async with self._changed:
                if not self.ended and at >= len(self.events):
                    await self._changed.wait()


class BackgroundResponses:
    """All responses that run or ran in the background."""

    def __init__(self, wire: OpenAIResponsesFormat, before_piece: BeforePiece, log: RequestLog) -> None:
        self._wire, self._before_piece, self._log = wire, before_piece, log
        self._responses: OrderedDict[str, BackgroundResponse] = OrderedDict()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, reply: Reply, *, latency_s: float, failure: str | None = None) -> BackgroundResponse:
        """Start to generate the reply, now."""
        started = BackgroundResponse(self._wire, reply, failure=failure)
        self._responses[started.id] = started
        while len(self._responses) > MAX_STORED:
            self._responses.popitem(last=False)
        task = asyncio.create_task(
            started.generate(latency_s, self._before_piece), name=f"model-server {started.id}"
        )
        self._tasks[started.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(started.id, None))
        return started

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- requests ----------------------------------------------------------------------------------------

    async def retrieve(self, name: str, request: ReceivedRequest, connection: ClientConnection) -> None:
        """Answer `GET /v1/responses/{name}`."""
        found = self._responses.get(name)
        self._log.write(event="retrieved", id=name, stream=request.query.get("stream") == "true")
        if found is None:
            await self._not_found(name, connection)
            return
        if request.query.get("stream") != "true":
            await connection.send_json(200, found.state())
            return
        await connection.begin_stream({})
        async for event in found.follow(int(request.query.get("starting_after", -1))):
            await connection.send_event(*event)
        await connection.end_stream()

    async def cancel(self, name: str, connection: ClientConnection) -> None:
        """Answer `POST /v1/responses/{name}/cancel`."""
        found = self._responses.get(name)
        self._log.write(event="cancelled", id=name)
        if found is None:
            await self._not_found(name, connection)
            return
        await found.cancel()
        if (task := self._tasks.get(name)) is not None:
            task.cancel()
        await connection.send_json(200, found.state())

    async def _not_found(self, name: str, connection: ClientConnection) -> None:
        problem = f"Response with id '{name}' not found."
        await connection.send_json(404, self._wire.error(404, problem, 0))


def _with_status(event: Event, status: str) -> Event:
    data = json.loads(event.data)
    data["response"]["status"] = status
    return Event(json.dumps(data, ensure_ascii=False, separators=(",", ":")), event.name)
