"""The limits of the fleet for one attempt: the only place that reserves its requests to a model in Redis.

A wait of up to a second happens inside the call. For a longer one, the run is parked. A reservation ends when
its request has ended, or when the attempt does not own the run any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, assert_never

from openagents_worker.errors import LLMRateLimitError, RedisUnreachable
from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.llm.limits import LimitWait, RequestLimit
from openagents_worker.runtime.call_ids import outside_runs
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.latch import LatchReason, RunLatched
from openagents_worker.runtime.services import Services
from openagents_worker.store import scripts
from openagents_worker.store.scripts import Admission, AdmissionAnswer, Wake

__all__ = ["RunLimits"]

WAIT_MS = 1_000
"""The longest wait inside a call."""
ASK_AGAIN_MS = 100
"""When a call asks again if all concurrent requests are in use. With jitter."""
PATIENCE_MS = 60_000
"""The longest wait inside a call of a run that cannot be parked."""
MAX_TOKENS = 1_000_000_000


class RunLimits:
    """Reserves the requests of one attempt."""

    def __init__(
        self,
        identity: RunIdentity,
        tenant: str,
        services: Services,
        *,
        store: FencedStore,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.tenant = tenant
        self._ids = {"run_id": identity.run_id, "fence": identity.fence}
        self._services = services
        self._store = store
        self._sleep = sleep
        self._requests = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def reserve(self, limit: RequestLimit, tokens: int) -> _Reserved:
        """See `FleetLimits`."""
        call = current_call.get()
        assert call is not None, "a request is limited only inside a recorded call"
        self._requests += 1
        reserved = _Reserved(self, limit.name, f"{call.call_id}#{self._requests}", min(tokens, MAX_TOKENS))
        may_park = call.may_suspend and call.kind == "model"
        waited_ms, is_announced = 0, False
        while True:
            admission = await self._ask(limit, reserved, may_park=may_park)
            delay_ms = admission.delay_ms
            if delay_ms and not is_announced:
                is_announced = True
                _emit_limited(call, limit.name, delay_ms)
            match admission.answer:
                case AdmissionAnswer.OK:
                    await self._wait_for_slot(reserved, delay_ms)
                    return reserved
                case AdmissionAnswer.FENCED:
                    self._store.lose_run("another worker owns the run")
                    raise RunLatched(LatchReason.FENCED)
                case AdmissionAnswer.LATER | AdmissionAnswer.BUSY as answer:
                    is_soon = answer is AdmissionAnswer.BUSY and waited_ms < WAIT_MS
                    if may_park and not is_soon:
                        if not is_announced:
                            _emit_limited(call, limit.name, delay_ms)
                        raise LimitWait(limit.name, max(delay_ms, 1))
                    if waited_ms >= PATIENCE_MS:
                        raise _no_room(limit.name, delay_ms)
                    pause_ms = ASK_AGAIN_MS * (0.5 + self._services.random_unit())
                    await self._sleep(pause_ms / 1000)
                    waited_ms += round(pause_ms)
                case _:
                    assert_never(admission.answer)

    async def _ask(self, limit: RequestLimit, reserved: _Reserved, *, may_park: bool) -> Admission:
        admission = await self._store.run(
            scripts.limit_take(
                name=limit.name,
                **self._ids,
                call=reserved.call,
                tokens=reserved.tokens,
                wait_ms=WAIT_MS,
                may_park=may_park,
                requests_per_minute=limit.requests_per_minute,
                tokens_per_minute=limit.tokens_per_minute,
                max_concurrency=limit.max_concurrency,
            )
        )
        if admission.wakes:
            self._start(self._services.send_wakes(admission.wakes))
        return admission

    async def _wait_for_slot(self, reserved: _Reserved, delay_ms: int) -> None:
        try:
            await self._sleep(delay_ms / 1000)
        except BaseException:
            reserved.end(used=0, was_sent=False)
            raise

    def settle(self, reserved: _Reserved, *, used: int, was_sent: bool, blocked_ms: int) -> None:
        """End a reservation in a task of its own: the call does not wait for it."""
        call = scripts.limit_settle(
            name=reserved.name,
            **self._ids,
            call=reserved.call,
            tokens=reserved.tokens,
            used=used,
            was_sent=was_sent,
            blocked_ms=min(blocked_ms, self._services.settings.retry_after_max_ms),
        )
        self._start(self._settle(call))

    async def _settle(self, call: scripts.ScriptCall[tuple[Wake, ...]]) -> None:
        # If it fails, the reservation ends with the attempt.
        with suppress(RedisUnreachable):
            wakes: Sequence[Wake] = await self._services.store.run_until(call, self._store.must_not_write)
            if wakes:
                await self._services.send_wakes(wakes)

    def _start(self, work: Coroutine[Any, Any, None] | Awaitable[None]) -> None:
        task = outside_runs(_awaited(work), name=f"limits {self._ids['run_id']}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for the tasks that end reservations."""
        if self._tasks:
            await asyncio.wait(list(self._tasks))


class _Reserved:
    """A reserved request; see `openagents_worker.llm.limits.Reserved`."""

    __slots__ = ("_limits", "call", "name", "tokens")

    def __init__(self, limits: RunLimits, name: str, call: str, tokens: int) -> None:
        self._limits = limits
        self.name = name
        self.call = call
        self.tokens = tokens

    def end(self, *, used: int | None = None, was_sent: bool = True, retry_after_ms: int = 0) -> None:
        known = -1 if used is None else min(used, MAX_TOKENS)
        self._limits.settle(self, used=known, was_sent=was_sent, blocked_ms=max(retry_after_ms, 0))


async def _awaited(work: Awaitable[None]) -> None:
    await work


def _emit_limited(call: CallInfo, name: str, delay_ms: int) -> None:
    if call.emit is not None:
        call.emit(
            "llm.limited", {"key": name, "delay_ms": delay_ms, "model": call.name, "call": call.call_id}
        )


def _no_room(name: str, delay_ms: int) -> LLMRateLimitError:
    return LLMRateLimitError(
        f"the limit {name!r} of the fleet had no room for a request within {PATIENCE_MS / 1000:.0f} s",
        hint="llm.limits is for all workers together; a durable run waits for as long as it takes",
        retry_after_ms=max(delay_ms, 1),
    )
