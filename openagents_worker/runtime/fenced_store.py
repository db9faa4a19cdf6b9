"""The fenced store: the only place where an attempt waits for Redis, as long as it owns its run.

A command without a reply is repeated until the lease ends; the scripts apply it once. The latch is set when
Redis reports that this worker does not own the run any more, and when a command fails with an error that a
repetition cannot fix.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar, assert_never

from openagents_worker.errors import OpenAgentsError, RedisRefused, RedisUnreachable
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.lease import Lease
from openagents_worker.runtime.services import Services
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.keys import Keys
from openagents_worker.store.scripts import (
    Begun,
    DecideAnswer,
    DecideResult,
    DelegateAnswer,
    Delegated,
    ScriptCall,
    WriteAnswer,
    WriteResult,
)
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.signals import count

__all__ = ["FencedStore"]

log = get_logger(__name__)

T = TypeVar("T")

_Errors = tuple[type[Exception], ...]
REPORT_S = 60.0  # a person who is asked meanwhile needs longer than a short failure of Redis
UNWRITABLE: _Errors = (UnicodeEncodeError,)  # a lone surrogate; the caller writes the end without it


class FencedStore:
    """Reads and writes of one attempt. They stop as soon as the run is fenced, or the lease is over."""

    def __init__(
        self, identity: RunIdentity, store: AsyncStore, *, lease: Lease, latch: Latch, on_disk: bool = False
    ) -> None:
        """`on_disk`: intents are on disk before their calls begin."""
        self.run_id = identity.run_id
        self.session_id = identity.session_id
        self.fence = identity.fence
        self._store = store
        self._lease = lease
        self._latch = latch
        self._on_disk = on_disk
        self._loop = asyncio.get_running_loop()
        self._waits: dict[asyncio.Task[Any], bool] = {}
        """The tasks that wait for Redis, and whether `_stop_waiting` has cancelled them."""
        latch.when_fenced(self._stop_waiting)

    @classmethod
    def of(cls, identity: RunIdentity, services: Services, *, lease: Lease, latch: Latch) -> FencedStore:
        """That of an attempt. With `OPENAGENTS_DURABILITY=strict`, intents are on disk."""
        on_disk = services.settings.durability == "strict"
        return cls(identity, services.store, lease=lease, latch=latch, on_disk=on_disk)

    @property
    def keys(self) -> Keys:
        return self._store.keys

    @property
    def codec(self) -> PayloadCodec:
        return self._store.codec

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """Read from Redis. The read is repeated while Redis cannot be reached, as long as the lease lasts."""
        return await self._await_or_latch(self._store.ask_until, question)

    async def journal_page(self, position: int) -> Sequence[str]:
        """One page of the records of this run, starting at `position`."""
        call = scripts.page(run_id=self.run_id, position=position, page_bytes=scripts.PAGE_BYTES)
        return await self.run(call)

    async def run(self, call: ScriptCall[T]) -> T:
        """Run a script whose answer the caller handles. It is repeated as a write is."""
        return await self._await_or_latch(self._store.run_until, call)

    def check_lease(self) -> None:
        """Raises `RunLatched` when the lease is over: no call may begin (rule EFFECTS 1 of the protocol)."""
        if self._lease.remaining_s() <= 0:
            self._latch.set(LatchReason.FENCED, detail="the lease is over")
            raise RunLatched(LatchReason.FENCED)

    def lose_run(self, detail: str) -> None:
        """Latch the run: a script has answered that this worker does not own it."""
        self._latch.set(LatchReason.FENCED, detail=detail)

    async def write(self, call: ScriptCall[WriteAnswer]) -> None:
        """Run a script that writes. Raises `RunLatched` if the run is fenced."""
        answer = await self._await_or_latch(self._store.run_until, call)
        if answer is not WriteAnswer.OK:
            self._act_on_answer(answer)

    async def write_ahead(self, call: ScriptCall[Begun]) -> Begun:
        """Run a script that writes an intent, on disk if the durability is strict."""
        begun: Begun = await self._await_or_latch(partial(self._store.run_until, on_disk=self._on_disk), call)
        self._act_on_answer(begun.answer)
        return begun

    async def decide(self, call: ScriptCall[DecideResult]) -> str:
        """Decide about a call of this run. Returns the first decision (JSON), '' if it is this one."""
        decided = await self.run(call)
        match decided.answer:
            case DecideAnswer.OK:
                return ""
            case DecideAnswer.ALREADY:
                return decided.decision
            case DecideAnswer.GONE | DecideAnswer.NOT_PENDING | DecideAnswer.UNKNOWN:
                self._latch.set(LatchReason.FENCED, detail=f"decide: {decided.answer}")
                raise RunLatched(LatchReason.FENCED)
            case _:
                assert_never(decided.answer)

    async def delegate(self, call: ScriptCall[Delegated]) -> Delegated:
        """Create or find a child run. Raises `RunLatched` if this run is cancelled or fenced."""
        delegated = await self.run(call)
        if delegated.answer in (DelegateAnswer.CANCEL, DelegateAnswer.FENCED, DelegateAnswer.MISPLACED):
            self._act_on_answer(WriteAnswer(delegated.answer.value))
            raise RunLatched(LatchReason.CANCELLED)
        return delegated

    async def report(self, call: ScriptCall[DecideResult], call_id: str) -> None:
        """Report the outcome of a call of a run that is fenced. It is repeated for a minute."""
        end_s = self._loop.time() + REPORT_S
        try:
            decided = await self._store.run_until(call, lambda: self._loop.time() > end_s)
        except OpenAgentsError as error:
            log.warning("run.late_outcome_lost", run_id=self.run_id, call_id=call_id, error=error.message)
            return
        log.warning("run.late_outcome", run_id=self.run_id, call_id=call_id, answer=str(decided.answer))

    async def write_last(self, call: ScriptCall[WriteResult]) -> WriteResult:
        """Run a script that ends the ownership of the run. It returns wake-ups to send."""
        reply: WriteResult = await self._await_or_latch(self._store.run_until, call, reraised=UNWRITABLE)
        if reply.answer is not WriteAnswer.OK:
            self._act_on_answer(reply.answer)
        return reply

    async def _await_or_latch(
        self,
        operation: Callable[[Any, Callable[[], bool]], Awaitable[T]],
        what: Any,
        *,
        reraised: _Errors = (),
    ) -> T:
        """Await an operation of the store on `what`. Its errors set the latch and raise `RunLatched`.

        The store itself repeats what may be repeated. Errors of the store never reach the pattern. Errors of
        the types in `reraised` are raised as they are.
        """
        if self._latch.reason is LatchReason.FENCED:
            raise RunLatched(LatchReason.FENCED)
        task = asyncio.current_task(self._loop)
        assert task is not None
        cancellations, self._waits[task] = task.cancelling(), False
        try:
            return await operation(what, self.must_not_write)
        except asyncio.CancelledError as error:
            if self._waits[task] and task.cancelling() - 1 <= cancellations:  # cancelled by `_stop_waiting`
                raise RunLatched(LatchReason.FENCED) from error
            raise
        except RedisUnreachable as error:
            stopped: OpenAgentsError = error
        except reraised:
            raise
        except Exception as error:  # a script or its reply is wrong: a bug in this library
            log.exception("run.store_failed", run_id=self.run_id)
            stopped = RedisRefused(f"{type(error).__name__}: {error}")
            stopped.__cause__ = error
        finally:
            if self._waits.pop(task):
                task.uncancel()
        self._latch.set(LatchReason.FENCED, error=stopped, detail=stopped.message)
        raise RunLatched(LatchReason.FENCED) from stopped

    def _stop_waiting(self) -> None:
        """The run is fenced: end all waits for replies of Redis."""
        for task in list(self._waits):
            self._waits[task] = True
            task.cancel()

    def must_not_write(self) -> bool:
        """Whether writes must stop: the lease is over or the run is fenced."""
        return self._lease.remaining_s() <= 0 or self._latch.reason is LatchReason.FENCED

    def _act_on_answer(self, answer: WriteAnswer) -> None:
        """Set the latch for the answer of a script. Raises `RunLatched` if the run is fenced."""
        match answer:
            case WriteAnswer.OK | WriteAnswer.SAME | WriteAnswer.OVERDUE:
                return
            case WriteAnswer.CANCEL:
                self._latch.set(LatchReason.CANCELLED)
            case WriteAnswer.FENCED | WriteAnswer.MISPLACED:
                if answer is WriteAnswer.MISPLACED:
                    log.error("run.misplaced_commit", run_id=self.run_id, fence=self.fence)
                count("openagents.writes.refused", 1, {"openagents.answer": answer.value.lower()})
                self._latch.set(LatchReason.FENCED, detail=answer.value)
                raise RunLatched(LatchReason.FENCED)
            case _:
                assert_never(answer)
