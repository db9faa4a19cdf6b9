"""The event queue of an attempt: the only place that decides when its events and deltas are sent to Redis.

Events are batched for a few milliseconds and are stored with the next commit.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from openagents_worker.llm.base import Delta, DeltaKind
from openagents_worker.redaction import shown_json
from openagents_worker.runtime.call_ids import outside_runs
from openagents_worker.runtime.event_text import EventText, masked_name
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.reply_stream import OutputStream, ReplyStream
from openagents_worker.runtime.services import Services

__all__ = ["Event", "EventWriter"]

T = TypeVar("T")

FLUSH_S = 0.02  # events are collected for this long: one round trip per step instead of three
MAX_FLUSH_S = 0.25  # the same for a process that is so busy that it is late: mostly, a commit comes first
BUSY_S = 0.002  # a timer that is later than this waits for other runs; on an idle loop it is in time
BATCH_EVENTS = 250  # per script: Redis needs 10 microseconds per event and serves no other client meanwhile
BATCH_BYTES = 256 * 1024
PENDING_EVENTS = 1_000  # when more events wait for Redis, `wait_for_space` blocks
PENDING_BYTES = 4 * 1024 * 1024
UNSENT_CHARS = 256 * 1024  # of the output of one tool

Event = tuple[str, Mapping[str, Any]]
"""The name and the payload of an event."""


class EventWriter(ABC):
    """Queues the events and the deltas of one attempt. A subclass stores a batch of them."""

    def __init__(self, identity: RunIdentity, services: Services, *, latch: Latch) -> None:
        self.run_id = identity.run_id
        self._attempt = identity.attempt
        self._latch = latch
        self._ids = shown_json(identity.ids)
        self._text = EventText(identity.run_id, services)
        self._write_lock = asyncio.Lock()
        self._pending: list[str] = []  # name, payload, name, payload …
        self._pending_chars = 0
        self._batch_no = 0
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: set[asyncio.Task[None]] = set()
        self._is_flush_due = False
        self._is_timer_late = False
        self._timer_at_s = 0.0  # loop time
        self._postponed_s = 0.0
        self._deltas: dict[str, ReplyStream | OutputStream] = {}
        self._pace = services.reply_pace
        self._loop = asyncio.get_running_loop()

    @property
    @abstractmethod
    def _has_deferred(self) -> bool:
        """Whether records wait for the next write."""

    @abstractmethod
    async def _store_batch(self, batch: list[str]) -> None:
        """Store these events, and the records that wait. The caller holds the write lock."""

    def emit(self, name: str, payload: Mapping[str, Any]) -> None:
        """Queue an event. It is stored with the next commit, or after `FLUSH_S` seconds without one.

        In a process that is too busy for that, it is stored after `MAX_FLUSH_S` at the latest.
        """
        self._add(masked_name(name), self._text.payload(payload))

    def emit_user_event(self, name: str, payload: Mapping[str, Any]) -> None:
        """Queue an event of user code, as `emit` does. Raises `StepTooLarge`."""
        self._add(*self._text.checked(name, payload))

    def check_event(self, name: str, payload: Mapping[str, Any]) -> None:
        """Raises `StepTooLarge` for an event that `emit_user_event` would refuse."""
        self._text.checked(name, payload)

    def _add(self, name: str, payload: str) -> None:
        self._pending += (name, payload)
        self._pending_chars += len(payload)
        if self._timer is None or self._is_timer_late:
            self._schedule(FLUSH_S)

    def _append(self, name: str, payload: str) -> None:
        """Queue an event that the caller stores at once."""
        self._pending += (name, payload)
        self._pending_chars += len(payload)

    @property
    def is_full(self) -> bool:
        """Whether too many events wait for Redis: call `wait_for_space` before the next one."""
        return len(self._pending) > 2 * PENDING_EVENTS or self._pending_chars > PENDING_BYTES

    async def wait_for_space(self) -> None:
        """Return when another event can be queued, or when the run is fenced and nothing can be written."""
        while self.is_full and self._latch.reason is not LatchReason.FENCED:
            await asyncio.wait([self._begin_flush()])

    def emit_run_event(self, name: str, **payload: Any) -> None:
        """Queue an event of the runtime. Its payload begins with the ids of run, session and agent."""
        self._add(name, self._of_run(payload) if payload else self._ids)

    def emit_run_events(self, names: Sequence[str], **payload: Any) -> None:
        """Queue several events with the same payload, as `emit_run_event` does."""
        text = self._of_run(payload)
        for name in names:
            self._add(name, text)

    def _of_run(self, payload: Mapping[str, Any]) -> str:
        return f"{self._ids[:-1]},{self._text.payload(payload)[1:]}"

    def preview(self, content: Any) -> Any:
        """The masked and shortened content of a call, for an event. The journal holds the whole content."""
        return self._text.preview(content)

    def delta(self, call: str, text: str) -> None:
        """Publish a piece of a streamed reply to current watchers. It is not stored."""
        self.delta_of(call, Delta(DeltaKind.TEXT, text))

    def delta_of(self, call: str, piece: Delta) -> None:
        """Publish a piece of the text, of the reasoning or of the tool arguments of a reply."""
        stream = self._deltas.get(call)
        if stream is None:
            stream = self._begin_deltas(call, ReplyStream())
        assert isinstance(stream, ReplyStream), "a call has one kind of stream"
        stream.add(piece)
        if self._timer is None:
            self._schedule(self._pace.interval_s)

    async def output(self, call: str, text: str) -> None:
        """Publish a piece of a tool's output to current watchers. It is not stored.

        Returns later if the tool writes faster than Redis takes it.
        """
        stream = self._deltas.get(call)
        if stream is None:
            stream = self._begin_deltas(call, OutputStream())
        assert isinstance(stream, OutputStream), "a call has one kind of stream"
        stream.add(text)
        if stream.unsent_chars > UNSENT_CHARS and self._latch.reason is not LatchReason.FENCED:
            await asyncio.wait([self._begin_flush()])
        elif self._timer is None:
            self._schedule(self._pace.interval_s)

    def _begin_deltas(self, call: str, stream: ReplyStream | OutputStream) -> ReplyStream | OutputStream:
        self._deltas[call] = stream
        self._pace.begin()
        return stream

    def end_deltas(self, call: str) -> None:
        """Queue the unsent rest of a streamed text, so that it is published before the event of the call."""
        stream = self._deltas.pop(call, None)
        if stream is None:
            return
        self._pace.end()
        for text in stream.take(call, self._attempt):
            self._add(stream.event, text)

    def _schedule(self, delay_s: float) -> None:
        """Flush after `delay_s`, or earlier if an earlier flush is scheduled."""
        if self._timer is not None:
            if not self._is_timer_late:
                return
            self._timer.cancel()
        self._is_timer_late = delay_s > FLUSH_S
        self._timer_at_s = self._loop.time() + delay_s
        self._timer = self._loop.call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        has_unsent = bool(self._deltas) and any(stream.has_unsent for stream in self._deltas.values())
        if not (self._pending or has_unsent or self._has_deferred):
            self._postponed_s = 0.0
            return  # a commit has stored everything meanwhile
        late_s = self._loop.time() - self._timer_at_s
        if late_s > BUSY_S and self._postponed_s < MAX_FLUSH_S and not has_unsent:
            # Flushes of many runs would make a busy process later still.
            self._postponed_s += late_s + FLUSH_S
            self._schedule(FLUSH_S)
            return
        self._postponed_s = 0.0
        if self._flushing:
            self._is_flush_due = True  # what waits until Redis has answered is sent together
        else:
            self._begin_flush()

    def _begin_flush(self) -> asyncio.Task[None]:
        self._is_flush_due = False
        task = outside_runs(self._flush_quietly(), name=f"flush {self.run_id}")
        self._flushing.add(task)
        task.add_done_callback(self._end_flush)
        return task

    def _end_flush(self, task: asyncio.Task[None]) -> None:
        self._flushing.discard(task)
        if self._is_flush_due and not self._flushing:
            self._begin_flush()

    async def _flush_quietly(self) -> None:
        """Flush in a task of the writer. No caller awaits it, so `RunLatched` is not raised."""
        with suppress(RunLatched):  # the latch is set; the next recorded call raises it
            await self.flush()

    async def flush(self) -> None:
        """Store the queued events and deferred records, and publish queued pieces of replies."""
        async with self._write_lock:
            await self._store_full_batches()
            await self._store_batch(self._take_batch())

    async def _store_full_batches(self) -> None:
        """Store all queued events except the last batch. The caller must hold the write lock.

        The last batch is left for the caller, which stores it together with its own write.
        """
        for call, stream in self._deltas.items():
            for text in stream.take(call, self._attempt):
                self._append(stream.event, text)
        while (length := self._batch_length()) < len(self._pending):
            batch, self._pending = self._pending[:length], self._pending[length:]
            self._pending_chars -= sum(map(len, batch[1::2]))
            self._batch_no += 1
            await self._store_batch(batch)

    def _batch_length(self) -> int:
        """How many items of `_pending` make one batch: an even number, at least one event."""
        length = min(len(self._pending), 2 * BATCH_EVENTS)
        if self._pending_chars <= BATCH_BYTES:
            return length
        size = 0
        for at in range(1, length, 2):
            size += len(self._pending[at])
            if size > BATCH_BYTES and at > 1:
                return at - 1
        return length

    def _take_batch(self, events: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> list[str]:
        """Take all queued events and append these. The result is one batch with a new batch number."""
        batch, self._pending, self._pending_chars = self._pending, [], 0
        for name, payload in events:
            batch += [name, self._text.payload(payload)]
        self._batch_no += 1
        self._postponed_s = 0.0
        return batch

    async def whole(self, writing: Coroutine[Any, Any, T], *, name: str) -> T:
        """Write, even if the current task is cancelled meanwhile; that is raised after the write.

        A write takes what is queued before it is sent, so all of it would be lost. If the run stops, a second
        cancellation is raised at once: then the end of the run waits for the write.
        """
        task = outside_runs(writing, name=name)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError:
                    if self._latch.reason is not None:
                        raise
            task.result()
            raise

    async def close(self) -> None:
        """Stop writing. Queued events are dropped; `finish` and `suspend` have stored theirs."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # a timer holds a reference to this writer
        self._is_flush_due = False
        for _ in self._deltas:
            self._pace.end()
        self._deltas.clear()
        for task in list(self._flushing):
            await asyncio.wait([task])
