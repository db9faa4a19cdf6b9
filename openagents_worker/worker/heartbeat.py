"""The heartbeat. The only place that registers and renews this process's lease.

It beats in a thread of its own over a connection of its own, so that no busy loop can starve it; one command
a beat, whatever the number of runs. Its answer says which runs Redis thinks are ours, and which of them
somebody wants to end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from openagents_worker.errors import RedisUnreachable
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.store.client import Cell
from openagents_worker.store.fleet import WorkerCard
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
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.background import Leave, background_thread
from openagents_worker.worker.connection_checks import LOOK_EVERY_S, RENEWAL_GRACE_MS, Looks
from openagents_worker.worker.lease import WorkerLease, boot_clock
from openagents_worker.worker.local_processes import ProcessIdentity

__all__ = ["Heartbeat", "RunHost"]

log = get_logger(__name__)

SAY_AGAIN_S = 5.0  # a log line about a Redis that is away at most this often


class RunHost(Protocol):
    """What heartbeat and watch want of the runner."""

    def known(self) -> frozenset[str]:
        """The runs that this process is claiming or running; from any thread."""
        ...

    def owned_runs(self) -> frozenset[str]:
        """Those of them that Redis has given to it; from any thread."""
        ...

    def latch(self, run_id: str, reason: LatchReason) -> None: ...

    async def latch_all(self, reason: LatchReason) -> None: ...


class Heartbeat:
    """Keeps the lease of one process from `start()` to `retire()`."""

    def __init__(
        self,
        *,
        cell: Cell,
        node: str,
        limits: TimeLimits,
        announcements: Sequence[str],
        run_host: RunHost,
        loop: asyncio.AbstractEventLoop,
        send_wakes: Callable[[Sequence[Wake]], Awaitable[None]],
        on_registered: Callable[[str], None],
        look_every_s: float = LOOK_EVERY_S,
        process: ProcessIdentity | None = None,
        on_neighbours: Callable[[Mapping[str, str]], None] = lambda neighbours: None,
        on_given_up: Callable[[], None] = lambda: None,
        max_recoveries: int = MAX_RECOVERIES,
        card: WorkerCard | None = None,
        loop_lag_ms: Callable[[], int] = lambda: 0,
        on_lease: Callable[[WorkerLease], None] = lambda lease: None,
        leave: Leave = os._exit,
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        """`card` is what the process says of itself to whoever lists the workers; `loop_lag_ms`, asked once
        a beat, for how long its event loop has answered nobody since the beat before. `on_lease` is
        given each lease before anything is claimed under it."""
        self._node = node
        self._limits = limits
        self._lease_ms = round(limits.lease_s * 1000)
        self._announcements = list(announcements)
        self._run_host = run_host
        self._loop = loop
        self._send_wakes = send_wakes
        self._on_registered = on_registered
        self._host = process.host if process is not None else ""
        self._process = process.process if process is not None else ""
        self._on_neighbours = on_neighbours
        self._max_recoveries = max_recoveries
        self._card = card
        self._loop_lag_ms = loop_lag_ms
        self._on_lease = on_lease
        self._clock = clock
        self._store = SubscribedStore(
            cell,
            answer_timeout_s=limits.renewal_answer_s,
            connect_timeout_s=limits.renewal_connect_s,
        )
        self._looks = Looks(
            self._store,
            host=self._host,
            ask=self._ask,
            clock=clock,
            look_every_s=look_every_s,
            on_given_up=lambda: self._post(on_given_up),
            on_neighbours=on_neighbours,
        )
        self._lease = WorkerLease.none_yet(limits)
        self._registered = threading.Event()
        self._stopping = threading.Event()
        self._thread = background_thread(self._main, name="openagents-heartbeat", leave=leave)
        self._said_s = -SAY_AGAIN_S
        self._strange = _Strange()

    @property
    def lease(self) -> WorkerLease:
        """The lease of now; another one after the old one was lost."""
        return self._lease

    def start(self) -> None:
        self._thread.start()

    def wait_registered(self, timeout_s: float) -> bool:
        """Whether Redis knows this process; waits at most so long for it."""
        return self._registered.wait(timeout_s)

    def retire(self) -> Literal["GONE", "OVER"]:
        """End the beating and the lease. OVER: runs are left, for the rescue of any worker to take."""
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
        return "GONE" if answer == "GONE" else "OVER"

    # --- in the thread ---

    def _main(self) -> None:
        while not self._stopping.is_set():
            if self._register():
                self._beat_until_over()

    def _register(self) -> bool:
        """Become a new incarnation, once the runs of the old one have let go. False: not yet."""
        if not self._lease.let_go.wait(self._limits.renewal_pause_s):
            return False
        incarnation, sent_s = f"{self._node}:{secrets.token_hex(6)}", self._clock()
        self._store.subscribe(self._store.keys.alive(incarnation))
        door = register(
            incarnation=incarnation,
            lease_ms=self._lease_ms,
            agents=self._announcements,
            previous=self._lease.incarnation,  # lost, and this process lives: no run has killed it
            host=self._host,
            process=self._process,
            info=self._card.to_json() if self._card is not None else "",
        )
        answer = self._ask(lambda: self._store.run(door))
        if answer is None:
            self._stopping.wait(self._limits.renewal_pause_s)
            return False
        lease = WorkerLease(incarnation, limits=self._limits, sent_s=sent_s, clock=self._clock)
        self._on_lease(lease)
        self._lease = lease
        self._strange = _Strange()
        self._looks.others = None
        self._registered.set()
        self._post(self._on_registered, incarnation)
        self._on_neighbours(answer.neighbours)  # also those that died before this process began
        log.info("worker.registered", incarnation=incarnation, lease_ms=self._lease_ms)
        return True

    def _beat_until_over(self) -> None:
        lease, sent_s, pause_s = self._lease, self._clock(), self._limits.beat_s
        while not self._pause_until(sent_s + pause_s) and lease.remaining_s() > 0:
            sent_s = self._clock()
            answer = self._ask(lambda: self._renew(lease.incarnation))
            pause_s = self._limits.beat_s if answer is not None else self._limits.renewal_pause_s
            if answer is None:
                continue
            if answer.lost:
                lease.give_up()
                log.warning("worker.lease_lost", incarnation=lease.incarnation)
                self._looks.say_alive(lease.incarnation)
                return
            lease.renewed(sent_s)
            self._looks.others = answer.others
            self._compare(lease.incarnation, answer)

    def _pause_until(self, end_s: float) -> bool:
        """Look after other workers until then; returns whether the beating is to end."""
        self._looks.until(end_s, self._stopping.is_set)
        return self._stopping.is_set()

    def _renew(self, incarnation: str) -> Renewal:
        self._store.connect()  # so that the server is the one that is told
        door = renew(
            incarnation=incarnation,
            lease_ms=self._lease_ms,
            server=self._store.server,
            renewed_within_ms=round(self._limits.beat_s * 1000) + RENEWAL_GRACE_MS,
            loop_lag_ms=self._loop_lag_ms(),
        )
        return self._store.run(door)

    def _compare(self, incarnation: str, answer: Renewal) -> None:
        """Act on what is wrong for the second beat in a row; in between a run may be changing hands."""
        for run_id in answer.cancel_requested:
            self._post(self._run_host.latch, run_id, LatchReason.CANCELLED)
        # A claim may take long: only what was ours at the beat before can be lost at this one.
        orphans, losses = self._strange.now(
            orphans=answer.owned - self._run_host.known(), losses=self._run_host.owned_runs() - answer.owned
        )
        for run_id in losses:
            log.of_run(logging.WARNING, "run.not_ours", run_id=run_id, incarnation=incarnation)
            self._post(self._run_host.latch, run_id, LatchReason.FENCED)
        for run_id in orphans:
            self._ask(lambda run_id=run_id: self._release(run_id, incarnation))  # type: ignore[misc]

    def _release(self, run_id: str, incarnation: str) -> None:
        """Give back a run that is ours and that nobody here runs (its claim's answer was lost)."""
        fence = self._store.ask(lambda r: r.hget(self._store.keys("run", run_id), "fence"))
        if (
            fence is None or run_id in self._run_host.known()
        ):  # known before it is claimed: so the fence is old
            return
        handed = self._store.run(
            release(
                run_id=run_id,
                incarnation=incarnation,
                fence=fence,
                kind=ReleaseKind.LOST,
                max_recoveries=self._max_recoveries,
            )
        )
        log.of_run(
            logging.WARNING, "run.released", run_id=run_id, incarnation=incarnation, answer=handed.answer
        )
        if handed.wakes and not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(_awaited(self._send_wakes(handed.wakes)), self._loop)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer, or None when there is none; the beat goes on whatever happens."""
        try:
            return question()
        except RedisUnreachable as error:
            if self._clock() - self._said_s >= SAY_AGAIN_S:
                self._said_s = self._clock()
                log.warning("redis.away", error=error.message, hint=error.hint)
        except Exception:  # a worker whose heart stops for a bug would lose all its runs
            log.exception("heartbeat.failed")
        return None

    def _post(self, callback: Callable[..., None], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)


class _Strange:
    """What was wrong at the last beat: a run is acted upon when it is wrong twice in a row."""

    def __init__(self) -> None:
        self._orphans: frozenset[str] = frozenset()
        self._losses: frozenset[str] = frozenset()

    def now(
        self, *, orphans: frozenset[str], losses: frozenset[str]
    ) -> tuple[frozenset[str], frozenset[str]]:
        twice = orphans & self._orphans, losses & self._losses
        self._orphans, self._losses = orphans, losses
        return twice


async def _awaited(work: Awaitable[None]) -> None:
    await work
