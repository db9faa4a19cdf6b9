"""The ledger of an attempt: the one lane on which its writes go out, in order, each fenced, each repeatable.

Events are batched for a few milliseconds and travel with the next commit; a write whose answer was lost is
repeated until the lease no longer allows it. An answer that says "not yours any more" sets the latch, and so
does an error that repeating will not mend.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar, assert_never

from openagents_worker.errors import (
    OpenAgentsError,
    RedisRefused,
    RedisUnreachable,
    StepTooLarge,
    text_of,
)
from openagents_worker.jsontext import dumps, whole_text
from openagents_worker.models import DEFAULT_MAX_PAYLOAD_BYTES, RunUsage
from openagents_worker.redaction import DEFAULT_REDACT_KEYS, MAX_VALUES, TooManyValues, redact, shown_json
from openagents_worker.runtime.call_ids import outside_runs
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.lease import Lease
from openagents_worker.secret_text import mask_prose, mask_short_prose
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.formats import WRITTEN
from openagents_worker.store.keys import Keys
from openagents_worker.store.scripts import ScriptCall, SuspendKind, WriteAnswer, WriteResult
from openagents_worker.telemetry.logs import get_logger

__all__ = ["RunWriter"]

log = get_logger(__name__)

T = TypeVar("T")

_Errors = tuple[type[Exception], ...]
UNWRITABLE: _Errors = (UnicodeEncodeError,)  # half a character: an ending can be written without it

FLUSH_S = 0.02  # events wait this long for company: one round trip instead of three a step
DELTA_S = 0.03  # and text that streams for about a frame
BATCH_EVENTS = 250  # of one script, which holds up everybody else's: an event takes Redis ten microseconds
BATCH_BYTES = 256 * 1024
MAX_EVENT_NAME_CHARS = 256  # as an id
UTF8_BYTES = 4  # of one character, at most
PENDING_EVENTS = 1_000  # more than these wait for Redis: whoever says the next one waits, too
PENDING_BYTES = 4 * 1024 * 1024
DELTA_CHARS = 64 * 1024  # of one piece of a reply


_Event = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A record that is stored with whatever is written next, with the events that tell of it."""

    position: int
    record: str
    usage: RunUsage
    saved: Sequence[_Event]


class RunWriter:
    """Everything one attempt writes, by one fence."""

    def __init__(
        self,
        *,
        store: AsyncStore,
        lease: Lease,
        run_id: str,
        fence: str,
        attempt: int,
        latch: Latch,
        ids: Mapping[str, str],
        preview_chars: int,
        length: int = 0,
        redact_keys: Collection[str] = DEFAULT_REDACT_KEYS,
        max_event_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
    ) -> None:
        """`ids` are those of run, session and agent: the payloads of the run's own events begin with them.
        `length` is that of the run's journal.

        `redact_keys` are parts of the names whose values no event shows; `max_event_bytes` is the limit of
        the payload of an event that somebody else's code emits.
        """
        self._store = store
        self._lease = lease
        self.run_id = run_id
        self.fence = fence
        self._attempt = attempt
        self._latch = latch
        self._ids = shown_json(ids)
        self._preview_chars = preview_chars
        self._redact_keys = redact_keys
        self._max_event_bytes = max_event_bytes
        self._lane = asyncio.Lock()
        self._pending: list[str] = []  # name, payload, name, payload …
        self._pending_chars = 0
        self._batch_no = 0
        self._length = length
        self._ahead: list[_Ahead] = []
        self.format = WRITTEN
        """The format of the run, as its records are written; whoever reads fewer leaves the run to others."""
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: set[asyncio.Task[None]] = set()
        self._deltas: dict[str, _Delta] = {}
        self._asking: set[asyncio.Timeout] = set()
        latch.when_fenced(self._abandon)

    # --- events ------------------------------------------------------------------------------------------

    def note(self, name: str, payload: Mapping[str, Any]) -> None:
        """An event, to be stored soon: with the next commit, or by itself after a moment."""
        self._add(_shown_name(name), self._shown(payload))

    def emit(self, name: str, payload: Mapping[str, Any]) -> None:
        """An event of somebody else's code, as `note`. Raises `StepTooLarge`."""
        name, shown = self._whole(name, payload)
        self._add(name, shown)

    def check_event(self, name: str, payload: Mapping[str, Any]) -> None:
        """Raises `StepTooLarge` for an event that `emit` would not take."""
        self._whole(name, payload)

    def _whole(self, name: str, payload: Mapping[str, Any]) -> tuple[str, str]:
        """The event as it is stored. Its values are counted before they are masked."""
        name = _shown_name(name)
        try:
            shown = shown_json(payload, self._redact_keys, is_whole=True)
        except TooManyValues:
            raise self._too_large(name, f"more than {MAX_VALUES:,} values") from None
        self._check_size(name, shown)
        return name, shown

    def _check_size(self, name: str, shown: str) -> None:
        most = self._max_event_bytes
        if len(name) > MAX_EVENT_NAME_CHARS:
            problem = f"{len(name):,} characters in its name, {MAX_EVENT_NAME_CHARS} are allowed"
        elif len(shown) * UTF8_BYTES > most and (size := len(shown.encode())) > most:
            problem = f"{size:,} bytes, {most:,} are allowed"
        else:
            return
        raise self._too_large(name, problem)

    def _too_large(self, name: str, problem: str) -> StepTooLarge:
        return StepTooLarge(
            f"the event {name[:40]!r} has {problem}",
            hint="emit a reference to where the whole is, or several events",
            run_id=self.run_id,
        )

    def _add(self, name: str, payload: str) -> None:
        self._pending += [name, payload]
        self._pending_chars += len(payload)
        self._schedule(FLUSH_S)

    @property
    def is_full(self) -> bool:
        """Whether more waits for Redis than should: who says the next event waits for `room`."""
        return len(self._pending) > 2 * PENDING_EVENTS or self._pending_chars > PENDING_BYTES

    async def room(self) -> None:
        """Returns when there is room for another event, or nothing can be written any more."""
        while self.is_full and self._latch.reason is not LatchReason.FENCED:
            await asyncio.wait([self._begin_flush()])

    def emit_run_event(self, name: str, **payload: Any) -> None:
        """An event of the run itself, whose payload begins with the ids."""
        more = self._shown(payload) if payload else "{}"
        self._add(name, self._ids if more == "{}" else f"{self._ids[:-1]},{more[1:]}")

    def preview(self, content: Any) -> Any:
        """What an event shows of a call's content, which stands in the journal: nothing is stored twice."""
        return redact(content, self._redact_keys, max_chars=self._preview_chars, mask=mask_prose)

    def _shown(self, payload: Mapping[str, Any]) -> str:
        return shown_json(payload, self._redact_keys)

    def delta(self, call: str, text: str) -> None:
        """A piece of a reply for those who watch now; it is not stored."""
        self._deltas.setdefault(call, _Delta()).add(text)
        self._schedule(DELTA_S)

    def end_deltas(self, call: str) -> None:
        """The reply is whole: what of it was not sent yet goes out before its event, so that all is sent."""
        piece = self._deltas.pop(call, None)
        for text in piece.take(call, self._attempt) if piece is not None else ():
            self._add("llm.delta", text)

    def _schedule(self, delay_s: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if not self._pending and not self._ahead and not any(piece.waits for piece in self._deltas.values()):
            return  # it has travelled with a commit
        self._begin_flush()

    def _begin_flush(self) -> asyncio.Task[None]:
        task = outside_runs(self._flush_quietly(), name=f"flush {self.run_id}")
        self._flushing.add(task)
        task.add_done_callback(self._flushing.discard)
        return task

    async def _flush_quietly(self) -> None:
        with suppress(RunLatched):  # the latch is set; whoever makes the next call will meet it
            await self.flush()

    async def flush(self) -> None:
        """Store the events that wait and publish the pieces of replies that wait."""
        async with self._lane:
            await self._store_ahead()
            await self._store_batch(self._take())

    async def _store_ahead(self) -> None:
        """Store what waits but for the last batch, so that no script gets more. For who holds the lane.

        Events keep their order, and those of a commit still travel with it.
        """
        for call, piece in self._deltas.items():
            for text in piece.take(call, self._attempt):
                self._add("llm.delta", text)
        while (words := self._words_of_batch()) < len(self._pending):
            batch, self._pending = self._pending[:words], self._pending[words:]
            self._pending_chars -= sum(map(len, batch[1::2]))
            self._batch_no += 1
            await self._store_batch(batch)

    def _words_of_batch(self) -> int:
        """How many words of what waits make one batch: at least one event's."""
        words = min(len(self._pending), 2 * BATCH_EVENTS)
        if self._pending_chars <= BATCH_BYTES:
            return words
        size = 0
        for at in range(1, words, 2):
            size += len(self._pending[at])
            if size > BATCH_BYTES and at > 1:
                return at - 1
        return words

    async def _store_batch(self, batch: list[str]) -> None:
        if ahead := self._take_ahead():
            await self._commit(0, [], ahead[-1].usage, batch, ahead)
        elif batch:
            await self._write(
                scripts.emit(run_id=self.run_id, fence=self.fence, batch_no=self._batch_no, events=batch)
            )

    def _take(self, events: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> list[str]:
        """What waits, as one batch with a number of its own, then these events."""
        batch, self._pending, self._pending_chars = self._pending, [], 0
        for name, payload in events:
            batch += [name, self._shown(payload)]
        self._batch_no += 1
        return batch

    # --- reads -------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Keys:
        return self._store.keys

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """A read that the run cannot go on without. A broken connection is no failure of the run: the read is
        repeated, as a write is."""
        return await self._patiently(lambda: self._store.ask_until(question, self._too_late))

    async def journal_page(self, position: int) -> Sequence[str]:
        """Records of this run from `position` on; only its owner adds to them."""
        door = scripts.page(run_id=self.run_id, position=position, page_bytes=scripts.PAGE_BYTES)
        return await self._patiently(lambda: self._store.run_until(door, self._too_late))

    def check_lease(self) -> None:
        """Raises `RunLatched` when too little of the lease is left to begin a call (EFFECTS 1)."""
        if self._lease.remaining_s() <= 0:
            self._latch.set(LatchReason.FENCED, detail="the lease is over")
            raise RunLatched(LatchReason.FENCED)

    # --- fenced writes -----------------------------------------------------------------------------------

    def begin(self, record: str, saved: _Event) -> None:
        """Record number 0, to be stored with whatever is written next. `saved` is its checkpoint's event."""
        self._ahead.append(_Ahead(0, record, RunUsage(), ()))
        self.note(*saved)

    def add(self, position: int, record: str, usage: RunUsage, saved: _Event) -> None:
        """Record number `position`, to be stored with what is written next, or by itself after a moment. It
        is not stored with the run's end: nothing asks for it any more."""
        self._ahead.append(_Ahead(position, record, usage, (saved,)))
        self._schedule(FLUSH_S)

    async def commit(
        self, position: int, record: str, usage: RunUsage, events: Sequence[tuple[str, Mapping[str, Any]]]
    ) -> None:
        """Store record number `position`. Must be called with the lane free; commits queue up behind it."""
        async with self._lane:
            await self._store_ahead()
            await self._commit(position, [record], usage, self._take(events), self._take_ahead(position))

    def _take_ahead(self, before: int | None = None) -> list[_Ahead]:
        """What waits to be stored with the next record, whose position is `before`; without a record, what
        nothing has to be stored before."""
        if before is None:
            before = self._length
            for ahead in self._ahead:
                before += ahead.position == before
        taken = [ahead for ahead in self._ahead if ahead.position < before]
        self._ahead = self._ahead[len(taken) :]
        return taken

    async def _commit(
        self,
        position: int,
        records: list[str],
        usage: RunUsage,
        batch: list[str],
        ahead: Sequence[_Ahead],
    ) -> None:
        if ahead:
            position = ahead[0].position
            records = [*(each.record for each in ahead), *records]
            told = [(name, self._shown(payload)) for each in ahead for name, payload in each.saved]
            batch = [*chain.from_iterable(told), *batch]
        await self._write(
            scripts.commit(
                run_id=self.run_id,
                fence=self.fence,
                position=position,
                records=records,
                usage=usage.model_dump_json(),
                batch_no=self._batch_no,
                events=batch,
                format=self.format,
            )
        )
        self._length = position + len(records)

    async def suspend(
        self,
        *,
        kind: SuspendKind,
        delay_ms: int,
        call: str,
        error_code: str,
        left_max_ms: int = 0,
        error_details: str = "",
    ) -> WriteResult:
        """Put the run aside; raises `RunLatched` when it is no longer ours or is to be cancelled."""
        if self._ahead:
            await self.flush()
        async with self._lane:
            await self._store_ahead()
            batch = self._take()
            return await self._hand(
                scripts.suspend(
                    run_id=self.run_id,
                    fence=self.fence,
                    kind=kind,
                    delay_ms=delay_ms,
                    call=call,
                    error_code=error_code,
                    batch_no=self._batch_no,
                    events=batch,
                    left_max_ms=left_max_ms,
                    error_details=error_details,
                )
            )

    async def finish(self, **ending: Any) -> WriteResult:
        """End the run; the keywords are those of the script, without what the ledger itself knows."""
        if any(ahead.position == 0 for ahead in self._ahead):
            await self.flush()
        self._ahead.clear()
        async with self._lane:
            await self._store_ahead()
            batch = self._take()
            return await self._hand(
                scripts.finish(
                    run_id=self.run_id, fence=self.fence, batch_no=self._batch_no, events=batch, **ending
                )
            )

    async def close(self) -> None:
        """No write after this one; what still waits is dropped (an ending has taken its events along)."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # it holds the call in which it was set, and that holds this ledger
        for task in list(self._flushing):
            await asyncio.wait([task])

    async def _write(self, call: ScriptCall[WriteAnswer]) -> None:
        self._obey(await self._repeat(call))

    async def _hand(self, call: ScriptCall[WriteResult]) -> WriteResult:
        handed: WriteResult = await self._repeat(call, passing=UNWRITABLE)
        self._obey(handed.answer)
        return handed

    async def _repeat(self, call: ScriptCall[Any], passing: _Errors = ()) -> Any:
        return await self._patiently(lambda: self._store.run_until(call, self._too_late), passing)

    async def _patiently(self, work: Callable[[], Awaitable[T]], passing: _Errors = ()) -> T:
        """Ask the store, which repeats what may be repeated. What is left stops the attempt: no error of the
        store is one of the run, or reaches the pattern. A run whose command is refused is released."""
        if self._latch.reason is LatchReason.FENCED:
            raise RunLatched(LatchReason.FENCED)
        patience = asyncio.timeout(None)
        try:
            async with patience:
                self._asking.add(patience)
                try:
                    return await work()
                finally:
                    self._asking.discard(patience)
        except TimeoutError as error:  # by `_abandon`: redis-py's own are translated below
            raise RunLatched(LatchReason.FENCED) from error
        except RedisUnreachable as error:
            stopped: OpenAgentsError = error
        except passing:
            raise
        except Exception as error:  # a script or its answer is wrong: that is our bug
            log.exception("run.store_failed", run_id=self.run_id)
            stopped = RedisRefused(f"{type(error).__name__}: {error}")
            stopped.__cause__ = error
        self._latch.set(LatchReason.FENCED, error=stopped, detail=stopped.message)
        raise RunLatched(LatchReason.FENCED) from stopped

    def _abandon(self) -> None:
        """Nothing may be written any more: nobody waits for a Redis that does not answer."""
        now_s = asyncio.get_running_loop().time()
        for patience in self._asking:
            patience.reschedule(now_s)

    def _too_late(self) -> bool:
        return self._lease.remaining_s() <= 0 or self._latch.reason is LatchReason.FENCED

    def _obey(self, answer: WriteAnswer) -> None:
        match answer:
            case WriteAnswer.OK | WriteAnswer.SAME | WriteAnswer.OVERDUE:
                return
            case WriteAnswer.CANCEL:
                self._latch.set(LatchReason.CANCELLED)
            case WriteAnswer.FENCED | WriteAnswer.MISPLACED:
                if answer is WriteAnswer.MISPLACED:
                    log.error("run.misplaced_commit", run_id=self.run_id, fence=self.fence)
                self._latch.set(LatchReason.FENCED, detail=answer.value)
                raise RunLatched(LatchReason.FENCED)
            case _:
                assert_never(answer)


def _shown_name(name: object) -> str:
    """An event's name; a pattern may give anything as one."""
    return mask_short_prose(name if type(name) is str and name.isascii() else text_of(name))


class _Delta:
    """What of a streaming reply is still to be sent, and how much was."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self.sent = 0

    @property
    def waits(self) -> bool:
        return bool(self._parts)

    def add(self, text: str) -> None:
        if text:
            self._parts.append(text)

    def take(self, call: str, attempt: int) -> list[str]:
        """The payloads of what was not sent yet."""
        whole = "".join(self._parts)
        self._parts.clear()
        payloads = []
        for at in range(0, len(whole), DELTA_CHARS):
            text = whole[at : at + DELTA_CHARS]
            piece = {"call": call, "attempt": attempt, "offset": self.sent, "text": whole_text(text)}
            payloads.append(dumps(piece))
            self.sent += len(text)
        return payloads
