"""Runs with their children: the only place that looks for what a person must decide in any of them.

A run that waits for a child gets no event when the child asks a person. So both are watched, and the children
of the child.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from openagents_worker.concurrency import end_task
from openagents_worker.errors import RequestInvalid, RunNotFound
from openagents_worker.events import RunEvent
from openagents_worker.models import Approval, RunRecord, RunState, Waiting, WaitKind
from openagents_worker.producer.client import AsyncClient

__all__ = ["AskingRun", "WatchedTree", "asking_runs", "run_that_asks"]

FOR_A_PERSON = frozenset({WaitKind.APPROVAL, WaitKind.OUTCOME, WaitKind.BUDGET})
LIVE = tuple(state for state in RunState if not state.is_terminal)
MAX_RUNS = 1_000  # that one look reads
MAX_WATCHED = 200  # at once, by one call; others are watched when one of these has ended
MAX_EVENTS = 100  # read ahead


@dataclass(frozen=True, slots=True)
class AskingRun:
    """A run that waits for a person."""

    record: RunRecord
    approvals: Sequence[Approval]

    @property
    def waits(self) -> Sequence[Waiting]:
        return [each for each in self.record.waiting if each.kind in FOR_A_PERSON]


async def asking_runs(client: AsyncClient, run_id: str) -> list[AskingRun]:
    """The runs that wait for a person: this one, and those for which it waits, whose parents come first.

    Raises `RunNotFound`.
    """
    found: list[AskingRun] = []
    left = deque([await client.handle(run_id).record()])
    read = 1
    while left:
        record = left.popleft()
        approvals = await client.handle(record.run_id).approvals()
        asking = AskingRun(record, approvals)
        if approvals or asking.waits:
            found.append(asking)
        for child_id in _awaited(record)[: MAX_RUNS - read]:
            read += 1
            if (child := await _child(client, child_id, record.run_id)) is not None:
                left.append(child)
    return found


async def run_that_asks(client: AsyncClient, run_id: str, call_id: str) -> str:
    """The run of a call that waits for an approval: this one, or a run below it that has not ended.

    A run that is being executed does not say for which children it waits, so all of them are looked at. It is
    this run if none of them has the call. Raises `RunNotFound`, and `RequestInvalid` if several have one.
    """
    found: list[str] = []
    left, read = deque([(await client.handle(run_id).record()).run_id]), 0
    while left and read < MAX_RUNS:
        read += 1
        id_ = left.popleft()
        if any(each.call_id.startswith(call_id) for each in await client.handle(id_).approvals()):
            found.append(id_)
        children = await client.runs(parent_run_id=id_, state=LIVE, limit=MAX_RUNS)
        left += [child.run_id for child in children.items]
    if run_id in found or not found:
        return run_id
    if len(found) > 1:
        raise RequestInvalid(
            f"calls of several runs have the call_id {call_id!r}: {', '.join(found[:3])}",
            hint="run_id must be that of the entry in approvals",
        )
    return found[0]


def _awaited(record: RunRecord) -> list[str]:
    """The names of what may be children for which the run waits."""
    return [each.name for each in record.waiting if each.kind is WaitKind.CHILD]


async def _child(client: AsyncClient, child_id: str, parent_id: str) -> RunRecord | None:
    """The record of a child; None if it has expired, or if this is not the id of a child of that run."""
    try:
        record = await client.handle(child_id).record()
    except RunNotFound:
        return None
    return record if record.parent_run_id == parent_id else None


class WatchedTree:
    """The events of a run after a number, and those of the children for which it waits."""

    def __init__(self, client: AsyncClient, run_id: str, after: int = 0) -> None:
        self._client = client
        self._run_id = run_id
        self._after = after
        self._events: asyncio.Queue[tuple[str, RunEvent | Exception | None]] = asyncio.Queue(MAX_EVENTS)
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._known = {run_id}
        self._left: deque[str] = deque()

    async def __aenter__(self) -> WatchedTree:
        self._begin(self._run_id, self._after)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._left.clear()
        for task in list(self._watching.values()):
            await end_task(task)

    async def events(self) -> AsyncIterator[tuple[str, RunEvent]]:
        """The id of a run and its event, until the run itself has ended."""
        while True:
            run_id, event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                if run_id == self._run_id:
                    return
                continue
            if event.name == "run.waiting":
                await self._watch_children(run_id)
            yield run_id, event

    async def _watch_children(self, run_id: str) -> None:
        try:
            record = await self._client.handle(run_id).record()
        except RunNotFound:
            return  # it has expired, and its watcher says so
        for child_id in _awaited(record):
            if child_id not in self._known and await _child(self._client, child_id, run_id) is not None:
                self._known.add(child_id)
                self._left.append(child_id)
        self._begin_next()

    def _begin_next(self) -> None:
        while self._left and len(self._watching) < MAX_WATCHED:
            self._begin(self._left.popleft(), 0)

    def _begin(self, run_id: str, after: int) -> None:
        task = asyncio.create_task(self._watch(run_id, after), name=f"watch {run_id}")
        self._watching[run_id] = task

    async def _watch(self, run_id: str, after: int) -> None:
        last: Exception | None = None
        try:
            async with aclosing(self._client.handle(run_id).events(after)) as events:
                async for event in events:
                    await self._events.put((run_id, event))
        except RunNotFound as error:  # a child may have expired
            last = error if run_id == self._run_id else None
        except Exception as error:  # noqa: BLE001 - the caller gets it
            last = error
        await self._events.put((run_id, last))
        del self._watching[run_id]
        self._known.discard(run_id)  # its parent may ask for it again
        self._begin_next()
