"""The runner of a worker process: claims runs and carries each in an attempt, all on one event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from openagents_worker.errors import RedisRefused, RedisUnreachable
from openagents_worker.models import RunResult, StopReason
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.attempt import Attempt, Carried, Outlook
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.lease import Lease
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.formats import WRITTEN
from openagents_worker.store.scripts import ClaimAnswer, Claimed, Wake
from openagents_worker.telemetry import get_logger

__all__ = ["Carried", "Outlook", "Runner"]

log = get_logger(__name__)


class Runner:
    """Carries the runs of one process.

    `lease` gives the current lease; `send_wakes` sends wake-up messages. Nothing here knows Celery.
    """

    def __init__(
        self,
        *,
        store: AsyncStore,
        lease: Callable[[], Lease],
        assembly: Assembly,
        settings: Settings,
        send_wakes: Callable[[Sequence[Wake]], Awaitable[None]],
    ) -> None:
        self.accepting = True
        self._store = store
        self._lease = lease
        self._assembly = assembly
        self._settings = settings
        self._send_wakes = send_wakes
        self._claim_patience_s = settings.time_limits.claim_patience_s
        self._claiming: dict[str, int] = {}
        self._attempts: dict[str, Attempt] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    async def carry(self, run_id: str, format_: int = WRITTEN) -> Carried:
        """Claim a run and carry it as far as it goes here. Never raises for what happens inside the run.

        `format_` is that of the message which asks for it.
        """
        with _Entry(self._claiming, run_id):
            lease, claimed = await self._claim(run_id, format_)
            if claimed.answer is not ClaimAnswer.CLAIMED:
                if claimed.wakes:
                    await self._send_wakes(claimed.wakes)
                return _not_carried(claimed)
            # Without a lease nothing is begun here: others may take the run at any moment.
            if not self.accepting or lease.remaining_s() <= 0:
                return await self._give_back(run_id, lease, claimed)
            attempt = Attempt(
                claimed,
                store=self._store,
                lease=lease,
                assembly=self._assembly,
                settings=self._settings,
                send_wakes=self._send_wakes,
            )
            self._attempts[run_id] = attempt
            self._idle.clear()
            try:
                carried = await attempt.carry()
                if isinstance(attempt.latch.error, RedisRefused):  # it goes on from its last checkpoint
                    error = attempt.latch.error
                    log.error("run.write_refused", run_id=run_id, error=error.message, hint=error.hint)
                    await self._give_back(run_id, lease, claimed)
                return carried
            finally:
                if self._attempts.get(run_id) is attempt:
                    del self._attempts[run_id]
                if not self._attempts:
                    self._idle.set()

    async def _claim(self, run_id: str, format_: int) -> tuple[Lease, Claimed]:
        """Ask until there is an answer: with one nonce, so that a lost answer is given once more."""
        give_up_at = time.monotonic() + self._claim_patience_s
        while True:
            lease = self._lease()
            call = scripts.claim(
                run_id=run_id,
                incarnation=lease.incarnation,
                nonce=secrets.token_hex(8),
                page_bytes=scripts.PAGE_BYTES,
                asked=format_,
            )
            try:
                claimed = await self._store.run_until(call, lambda: time.monotonic() > give_up_at)
            except RedisUnreachable as error:
                log.warning("run.claim_failed", run_id=run_id, error=error.message)
                return lease, Claimed(ClaimAnswer.UNKNOWN)
            if claimed.answer is not ClaimAnswer.NOT_ALIVE or time.monotonic() > give_up_at:
                return lease, claimed
            await asyncio.sleep(0.05)  # the heartbeat is about to register a new incarnation

    async def _give_back(self, run_id: str, lease: Lease, claimed: Claimed) -> Carried:
        """Redis does not answer before the lease is over: then the run is reclaimed with it."""
        try:
            released = await self._store.run_until(
                scripts.release(run_id=run_id, incarnation=lease.incarnation, fence=claimed.fence),
                lambda: lease.remaining_s() <= 0,
            )
        except RedisUnreachable as error:
            log.warning(
                "run.not_released", run_id=run_id, error=error.message, hint="the heartbeat releases it"
            )
        else:
            await self._send_wakes(released.wakes)
        return Carried(Outlook.NOTHING, "handover")

    # --- for the heartbeat -------------------------------------------------------------------------------

    def known(self) -> frozenset[str]:
        """Runs that this process claims or carries; may be asked from any thread."""
        return frozenset(self._claiming.copy())

    def carried(self) -> frozenset[str]:
        """Those of them whose claim has been answered: they are ours; may be asked from any thread."""
        return frozenset(self._attempts.copy())

    def latch(self, run_id: str, reason: LatchReason, detail: str = "") -> None:
        """Stop a run of this process; call it on the loop."""
        attempt = self._attempts.get(run_id)
        if attempt is not None:
            attempt.latch.set(reason, detail=detail)

    def note(self, run_id: str, name: str, payload: Mapping[str, Any]) -> None:
        """Store an event on a run of this process; call it on the loop."""
        attempt = self._attempts.get(run_id)
        if attempt is not None:
            attempt.note(name, payload)

    async def latch_all(self, reason: LatchReason, detail: str = "") -> None:
        """Stop every run of this process; returns when all have let go."""
        for attempt in list(self._attempts.values()):
            attempt.latch.set(reason, detail=detail)
        await self._idle.wait()

    async def hurry_all(self) -> None:
        """Cancel the calls of runs that are to be handed over; returns when all have been."""
        for attempt in list(self._attempts.values()):
            attempt.latch.hurry()
        await self._idle.wait()


def _not_carried(claimed: Claimed) -> Carried:
    """What a claim that gave no work says of the run: its end, where nobody else has told or will tell it."""
    if claimed.answer is ClaimAnswer.CANCELLED:
        return Carried(Outlook.ENDED, stop_reason=StopReason.CANCELLED, life=claimed.life)
    if claimed.untold:
        result = RunResult[Any].model_validate_json(claimed.untold)
        return Carried(
            Outlook.ENDED, stop_reason=result.stop_reason, error=result.error_details, life=claimed.life
        )
    return Carried(Outlook.NOTHING, claimed.answer.value.lower())


class _Entry:
    """Counts a run as known for as long as the block runs; two messages of one run may be in it at once."""

    def __init__(self, counts: dict[str, int], run_id: str) -> None:
        self._counts, self._run_id = counts, run_id

    def __enter__(self) -> None:
        self._counts[self._run_id] = self._counts.get(self._run_id, 0) + 1

    def __exit__(self, *_: object) -> None:
        self._counts[self._run_id] -= 1
        if self._counts[self._run_id] == 0:
            del self._counts[self._run_id]
