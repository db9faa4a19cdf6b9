"""The heartbeat: the only place that registers this process and renews its lease.

It beats in its own thread over its own connection, so that a busy event loop cannot delay it. One beat is one
command, whatever the number of runs. The reply lists the runs that Redis has given to this process, and those
of them that are to be cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from openagents_worker.errors import RedisUnreachable
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.store.client import Cell
from openagents_worker.store.fleet import WorkerCard
from openagents_worker.store.part_health import DATA_LOST
from openagents_worker.store.scripts import (
    MAX_RECOVERIES,
    ReleaseKind,
    Renewal,
    Wake,
    register,
    release,
    renew,
    retire,
)
from openagents_worker.store.subscribed import SubscribedStore
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.signals import count, observe
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.background import Health, ProcessControls, background_thread
from openagents_worker.worker.connection_checks import CHECK_EVERY_S, RENEWAL_GRACE_MS, ConnectionChecks
from openagents_worker.worker.lease import WorkerLease
from openagents_worker.worker.local_processes import ProcessIdentity

__all__ = ["Heartbeat", "HeartbeatCallbacks", "HeartbeatLimits", "WorkerRegistration", "RunHost"]

log = get_logger(__name__)

LOG_AGAIN_S = 5.0  # between two log lines about a Redis that is unreachable


class RunHost(Protocol):
    """What the heartbeat and the watchdog need from the runner."""

    def known(self) -> frozenset[str]:
        """The runs that this process is claiming or running. Thread-safe."""
        ...

    def owned_runs(self) -> frozenset[str]:
        """Those of `known()` that Redis has given to this process. Thread-safe."""
        ...

    def latch(self, run_id: str, reason: LatchReason) -> None: ...

    async def latch_all(self, reason: LatchReason) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRegistration:
    """What a process announces about itself when it registers.

    `announcements` are the agents that it serves, as `Assembly.announcements` returns them. `card` describes
    the process for listings of workers. `process` is None if its death cannot be detected on its host.
    """

    node: str
    announcements: Sequence[str] = ()
    process: ProcessIdentity | None = None
    card: WorkerCard | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatLimits:
    """`check_every_s` is the time between two checks of other workers' connections; 0 switches them off."""

    times: TimeLimits
    check_every_s: float = CHECK_EVERY_S
    max_recoveries: int = MAX_RECOVERIES


async def _send_nothing(wakes: Sequence[Wake]) -> None:
    """Send no wake-ups: the rescue loop sends them later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatCallbacks:
    """What the heartbeat calls: `on_lease` and `on_local_workers` in its thread, the others on the loop.

    `on_lease` receives each lease before a run is claimed under it, `on_registered` each new incarnation.
    `on_notice` receives each notice in the worker's box, with every
    heartbeat. `on_given_up` is called after the lease of another
    worker was ended, and `on_local_workers` with the workers of this host: incarnation -> process.
    `loop_lag_ms` is called once per beat, in the thread; it returns the longest time without an answer of the
    event loop since the previous beat.
    """

    send_wakes: Callable[[Sequence[Wake]], Awaitable[None]] = _send_nothing
    on_registered: Callable[[str], None] = lambda incarnation: None
    on_lease: Callable[[WorkerLease], None] = lambda lease: None
    on_local_workers: Callable[[Mapping[str, str]], None] = lambda workers: None
    on_notice: Callable[[str], None] = lambda text: None
    on_given_up: Callable[[], None] = lambda: None
    loop_lag_ms: Callable[[], int] = lambda: 0
    part_problems: Callable[[], str] = lambda: ""


class Heartbeat:
    """Holds the lease of one process from `start()` to `stop()`."""

    name = "heartbeat"

    def __init__(
        self,
        cell: Cell,
        registration: WorkerRegistration,
        *,
        limits: HeartbeatLimits,
        run_host: RunHost,
        loop: asyncio.AbstractEventLoop,
        callbacks: HeartbeatCallbacks = HeartbeatCallbacks(),
        process: ProcessControls = ProcessControls(),  # noqa: B008 - it is frozen
    ) -> None:
        self._registration = registration
        self._limits = limits.times
        self._max_recoveries = limits.max_recoveries
        self._lease_ms = round(limits.times.lease_s * 1000)
        self._run_host = run_host
        self._loop = loop
        self._callbacks = callbacks
        own = registration.process
        self._host = own.host if own is not None else ""
        self._clock = process.clock
        self._store = SubscribedStore(
            cell,
            answer_timeout_s=limits.times.renewal_answer_s,
            connect_timeout_s=limits.times.renewal_connect_s,
        )
        self._connection_checks = ConnectionChecks(
            self._store,
            host=self._host,
            ask=self._ask,
            clock=process.clock,
            check_every_s=limits.check_every_s,
            on_given_up=lambda: self._call_on_loop(callbacks.on_given_up),
            on_local_workers=callbacks.on_local_workers,
        )
        self._lease = WorkerLease.none_yet(limits.times)
        self._registered = threading.Event()
        self._stopping = threading.Event()
        self._thread = background_thread(self._main, name="openagents-heartbeat", leave=process.leave)
        self._logged_at_s = -LOG_AGAIN_S
        self._data_id = ""
        self._mismatches = _Mismatches()
        self.health = Health()
        self.has_left_runs = False
        """Whether runs were left at the end of the last lease, which a rescue loop must reclaim."""

    @property
    def lease(self) -> WorkerLease:
        """The current lease; a lost lease is replaced by a new one."""
        return self._lease

    def start(self) -> None:
        self._thread.start()

    def wait_registered(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` for the first registration; returns whether it was made."""
        return self._registered.wait(timeout_s)

    def stop(self) -> None:
        """Stop the heartbeat and end the lease."""
        self._stopping.set()
        self._store.wake()
        if self._thread.ident is not None:
            self._thread.join(self._limits.heartbeat_stop_s)
        lease, answer = self._lease, "OVER"
        lease.give_up()
        try:
            if lease.incarnation:
                answer = self._store.run(retire(incarnation=lease.incarnation, host=self._host))
        except RedisUnreachable as error:
            log.warning("worker.not_retired", incarnation=lease.incarnation, error=error.message)
        finally:
            self._store.close()
        self.has_left_runs = answer != "GONE"

    # --- in the thread ---

    def _main(self) -> None:
        while not self._stopping.is_set():
            if self._register():
                self._beat_until_over()

    def _register(self) -> bool:
        """Register a new incarnation after the runs of the old one have stopped. False if that has failed."""
        if not self._lease.runs_stopped.wait(self._limits.renewal_pause_s):
            return False
        registration = self._registration
        incarnation, sent_s = f"{registration.node}:{secrets.token_hex(6)}", self._clock()
        self._store.subscribe(self._store.keys.alive(incarnation))
        script_call = register(
            incarnation=incarnation,
            lease_ms=self._lease_ms,
            agents=list(registration.announcements),
            # Its lease is lost, but this process lives: none of its runs is a suspect.
            previous=self._lease.incarnation,
            host=self._host,
            process=registration.process.process if registration.process is not None else "",
            info=registration.card.to_json() if registration.card is not None else "",
        )
        answer = self._ask(lambda: self._store.run(script_call))
        if answer is None:
            self._stopping.wait(self._limits.renewal_pause_s)
            return False
        lease = WorkerLease(incarnation, limits=self._limits, sent_s=sent_s, clock=self._clock)
        self._callbacks.on_lease(lease)
        self._lease = lease
        self._mismatches = _Mismatches()
        self._connection_checks.other_workers = None
        self._registered.set()
        self._call_on_loop(self._callbacks.on_registered, incarnation)
        self._callbacks.on_local_workers(
            answer.neighbours
        )  # includes workers that died before this process started
        log.info("worker.registered", incarnation=incarnation, lease_ms=self._lease_ms)
        self._compare_data(answer.data_id)
        return True

    def _compare_data(self, data_id: str) -> None:
        """Report it if Redis has lost its data since this process registered before."""
        if self._data_id not in ("", data_id):
            self.health.failed("Redis has lost its data", code=DATA_LOST)
            log.error(
                "redis.data_lost",
                hint="the runs that were accepted before are gone: submit them again; a Redis with "
                "appendonly yes keeps its data",
            )
        self._data_id = data_id

    def _beat_until_over(self) -> None:
        """Renew the lease until it is lost or the heartbeat stops."""
        lease, sent_s, pause_s = self._lease, self._clock(), self._limits.beat_s
        while not self._pause_until(sent_s + pause_s) and lease.remaining_s() > 0:
            sent_s = self._clock()
            answer = self._ask(lambda: self._renew(lease.incarnation))
            if answer is not None:
                observe("openagents.lease.renewal", max(self._clock() - sent_s, 0.0))
            pause_s = self._limits.beat_s if answer is not None else self._limits.renewal_pause_s
            if answer is None:
                continue
            if answer.lost:
                lease.give_up()
                self.health.failed(f"the lease of {lease.incarnation} was lost", code="worker.lease_lost")
                count("openagents.leases.lost")
                log.warning("worker.lease_lost", incarnation=lease.incarnation)
                self._connection_checks.report_false_alarm(lease.incarnation)
                return
            lease.renewed(sent_s)
            self.health.succeeded()
            self._connection_checks.other_workers = answer.others
            self._compare_runs(lease.incarnation, answer)

    def _pause_until(self, end_s: float) -> bool:
        """Check other workers until `end_s`; returns whether the heartbeat must stop."""
        self._connection_checks.check_until(end_s, self._stopping.is_set)
        return self._stopping.is_set()

    def _renew(self, incarnation: str) -> Renewal:
        """Send one renewal."""
        self._store.connect()  # so that `server` is the one that receives the command
        script_call = renew(
            incarnation=incarnation,
            lease_ms=self._lease_ms,
            server=self._store.server,
            renewed_within_ms=round(self._limits.beat_s * 1000) + RENEWAL_GRACE_MS,
            loop_lag_ms=self._callbacks.loop_lag_ms(),
            parts=self._callbacks.part_problems(),
        )
        return self._store.run(script_call)

    def _compare_runs(self, incarnation: str, answer: Renewal) -> None:
        """Compare the runs of Redis and of this process. Act on differences that two beats in a row show:
        a single beat may fall between the claim of a run and its reply."""
        for text in answer.notices:
            self._call_on_loop(self._callbacks.on_notice, text)
        # A claim may take long: only a run that was owned at the previous beat can be lost at this one.
        orphans, losses = self._mismatches.confirmed(
            orphans=answer.owned - self._run_host.known(), losses=self._run_host.owned_runs() - answer.owned
        )
        for run_id in losses:
            log.of_run(logging.WARNING, "run.not_ours", run_id=run_id, incarnation=incarnation)
            self._call_on_loop(self._run_host.latch, run_id, LatchReason.FENCED)
        for run_id in orphans:
            self._ask(lambda run_id=run_id: self._release(run_id, incarnation))  # type: ignore[misc]

    def _release(self, run_id: str, incarnation: str) -> None:
        """Release a run that Redis has given to this process but that it does not run: the reply was lost."""
        fence = self._store.ask(lambda r: r.hget(self._store.keys("run", run_id), "fence"))
        # A run is known before it is claimed: if it is known now, the fence may be old.
        if fence is None or run_id in self._run_host.known():
            return
        released = self._store.run(
            release(
                run_id=run_id,
                incarnation=incarnation,
                fence=fence,
                kind=ReleaseKind.LOST,
                max_recoveries=self._max_recoveries,
            )
        )
        log.of_run(
            logging.WARNING, "run.released", run_id=run_id, incarnation=incarnation, answer=released.answer
        )
        if released.wakes and not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(
                _as_coroutine(self._callbacks.send_wakes(released.wakes)), self._loop
            )

    def _ask(self, query: Callable[[], Any]) -> Any:
        """The reply, or None if Redis does not answer or the query fails. The heartbeat continues."""
        try:
            return query()
        except RedisUnreachable as error:
            self.health.failed(error)
            if self._clock() - self._logged_at_s >= LOG_AGAIN_S:
                self._logged_at_s = self._clock()
                log.warning("redis.away", error=error.message, hint=error.hint)
        except Exception as error:  # a bug here must not cost the worker its lease and all its runs
            self.health.failed(error)
            log.exception("heartbeat.failed")
        return None

    def _call_on_loop(self, callback: Callable[..., None], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)


class _Mismatches:
    """The differences at the last beat; a difference is confirmed when the next beat shows it again."""

    def __init__(self) -> None:
        self._orphans: frozenset[str] = frozenset()
        self._losses: frozenset[str] = frozenset()

    def confirmed(
        self, *, orphans: frozenset[str], losses: frozenset[str]
    ) -> tuple[frozenset[str], frozenset[str]]:
        confirmed = orphans & self._orphans, losses & self._losses
        self._orphans, self._losses = orphans, losses
        return confirmed


async def _as_coroutine(work: Awaitable[None]) -> None:
    await work
