"""The limits of the fleet for one attempt: the only place that reserves its requests to a model in Redis.

A wait of up to a second happens inside the call. For a longer one, the run is parked. A reservation ends when
its request has ended, or when the attempt does not own the run any more.
"""

from __future__ import annotations

import asyncio
import time
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
LATE_MS = 400
"""A reserved request that can be sent only so late, because the process was busy, is reserved again. Late
requests come together with those after them: this is 4 % of a window of ten seconds."""
MAX_LATE = 1
"""How often a request is reserved again: each time loses what was reserved."""
LATE_WAIT_MS = 3_000
"""The longest wait of such a request: longer than other runs are called ahead."""
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tenant = tenant
        self._ids = {"run_id": identity.run_id, "fence": identity.fence}
        self._services = services
        self._store = store
        self._sleep = sleep
        self._clock = clock
        self._requests = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def reserve(self, limit: RequestLimit, tokens: int) -> _Reservation:
        """See `FleetLimits`."""
        call = current_call.get()
        assert call is not None, "a request is limited only inside a recorded call"
        wait = _RequestWait(call, limit.name, self.tenant)
        while True:
            self._requests += 1
            reserved = _Reservation(self, limit.name, f"{call.call_id}#{self._requests}", tokens)
            asked_s = self._clock()
            try:
                admission = await self._ask(limit, reserved, may_park=wait.may_park, was_late=wait.late > 0)
            except BaseException:  # the request may be reserved, although its answer has not arrived
                reserved.end(used=0, was_sent=False)
                raise
            wait.announce(admission.delay_ms)
            match admission.answer:
                case AdmissionAnswer.OK:
                    if await self._is_in_time(reserved, asked_s, admission.delay_ms, wait):
                        return reserved
                case AdmissionAnswer.FENCED:
                    self._store.lose_run("another worker owns the run")
                    raise RunLatched(LatchReason.FENCED)
                case AdmissionAnswer.LATER | AdmissionAnswer.BUSY as answer:
                    wait.check(admission.delay_ms, is_soon=answer is AdmissionAnswer.BUSY)
                    pause_ms = ASK_AGAIN_MS * (0.5 + self._services.random_unit())
                    await self._sleep(pause_ms / 1000)
                    wait.waited_ms += pause_ms
                case _:
                    assert_never(admission.answer)

    async def _ask(
        self, limit: RequestLimit, reserved: _Reservation, *, may_park: bool, was_late: bool
    ) -> Admission:
        """Ask for a request. One that was late does not wait for the turn of its run again."""
        admission = await self._store.run(
            scripts.limit_take(
                name=limit.name,
                **self._ids,
                call=reserved.call,
                tokens=reserved.tokens,
                wait_ms=LATE_WAIT_MS if was_late else WAIT_MS,
                may_park=may_park and not was_late,
                requests_per_minute=limit.requests_per_minute,
                tokens_per_minute=limit.tokens_per_minute,
                max_concurrency=limit.max_concurrency,
            )
        )
        if admission.wakes:
            self._start(self._services.send_wakes(admission.wakes))
        return admission

    async def _is_in_time(
        self, reserved: _Reservation, asked_s: float, delay_ms: int, wait: _RequestWait
    ) -> bool:
        """Wait until the request may be sent. False: this process was so late that the request would crowd
        those after it. Its time is lost, and it must be reserved again."""
        try:
            await self._sleep(delay_ms / 1000)
        except BaseException:
            reserved.end(used=0, was_sent=False)
            raise
        late_ms = (self._clock() - asked_s) * 1000 - delay_ms
        if late_ms <= LATE_MS or wait.late >= MAX_LATE:
            return True
        wait.late += 1
        await self._settle(self._settlement(reserved, used=0, was_sent=False))
        return False

    def settle(self, reserved: _Reservation, *, used: int, was_sent: bool, blocked_ms: int) -> None:
        """End a reservation in a task of its own: the call does not wait for it."""
        self._start(
            self._settle(self._settlement(reserved, used=used, was_sent=was_sent, blocked_ms=blocked_ms))
        )

    def _settlement(
        self, reserved: _Reservation, *, used: int, was_sent: bool, blocked_ms: int = 0
    ) -> scripts.ScriptCall[tuple[Wake, ...]]:
        return scripts.limit_settle(
            name=reserved.name,
            **self._ids,
            call=reserved.call,
            tokens=reserved.tokens,
            used=used,
            was_sent=was_sent,
            blocked_ms=min(blocked_ms, self._services.settings.retry_after_max_ms),
        )

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


class _RequestWait:
    """How a call has waited for its request so far."""

    def __init__(self, call: CallInfo, name: str, tenant: str) -> None:
        self.may_park = call.may_suspend and call.kind == "model"
        self.waited_ms = 0.0
        self.late = 0
        """How often the request was reserved and not sent in time."""
        self._call = call
        self._name = name
        self._tenant = tenant
        self._is_announced = False

    def announce(self, delay_ms: int) -> None:
        """Emit `llm.limited`, once."""
        if delay_ms and not self._is_announced and self._call.emit is not None:
            self._is_announced = True
            model, call_id = self._call.name, self._call.call_id
            payload = {"key": self._name, "delay_ms": delay_ms, "model": model, "call": call_id}
            self._call.emit("llm.limited", payload)

    def check(self, delay_ms: int, *, is_soon: bool) -> None:
        """Raises `LimitWait`, or `LLMRateLimitError` for a run that cannot be parked, unless the call may ask
        again."""
        if self.may_park and not (is_soon and self.waited_ms < WAIT_MS):
            delay_ms = max(delay_ms, 1)
            self.announce(delay_ms)
            raise LimitWait(self._name, delay_ms, self._tenant)
        if self.waited_ms >= PATIENCE_MS:
            raise LLMRateLimitError(
                f"the limit {self._name!r} of the fleet had no room for {PATIENCE_MS / 1000:.0f} s",
                hint="llm.limits is for all workers together; a durable run waits for as long as it takes",
                retry_after_ms=max(delay_ms, 1),
            )


class _Reservation:
    """A reserved request; see `openagents_worker.llm.limits.Reserved`."""

    __slots__ = ("_limits", "call", "name", "tokens")

    def __init__(self, limits: RunLimits, name: str, call: str, tokens: int) -> None:
        self._limits = limits
        self.name = name
        self.call = call
        self.tokens = min(tokens, MAX_TOKENS)

    def end(self, *, used: int | None = None, was_sent: bool = True, retry_after_ms: int = 0) -> None:
        known = -1 if used is None else min(used, MAX_TOKENS)
        self._limits.settle(self, used=known, was_sent=was_sent, blocked_ms=max(retry_after_ms, 0))


async def _awaited(work: Awaitable[None]) -> None:
    await work
