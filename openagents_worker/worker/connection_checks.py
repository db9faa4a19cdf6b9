"""Connection checks: the only place that detects other workers whose connection to Redis is closed.

The kernel closes the connections of a dead process on any host, and Redis notices at once. Each heartbeat
connection subscribes to a channel of its incarnation, and a check asks Redis which channels have no
subscriber. A live worker whose connection was cut has reconnected and renewed its lease before it is given
up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from openagents_worker.store.scripts import FalseAlarm, LookResult, alarm, look
from openagents_worker.store.subscribed import SubscribedStore
from openagents_worker.telemetry.logs import get_logger

__all__ = ["CHECK_EVERY_S", "RENEWAL_GRACE_MS", "ConnectionChecks"]

log = get_logger(__name__)

CHECK_EVERY_S = 1.0
SILENCE_MS = 2_000  # a reconnect takes milliseconds; this leaves time for a very busy machine
RENEWAL_GRACE_MS = 1_000  # a renewal may be this much later than one heartbeat after the previous renewal
RECONNECT_PAUSE_S = 0.05  # between a closed connection and the next one


class ConnectionChecks:
    """What the heartbeat's thread does between two renewals. Call all methods in that thread.

    `ask` calls a function that queries Redis, and returns None if Redis does not answer. `on_given_up` is
    called after a lease was ended. `on_local_workers` receives the workers of this host: incarnation ->
    process.
    """

    def __init__(
        self,
        store: SubscribedStore,
        *,
        host: str,
        ask: Callable[[Callable[[], Any]], Any],
        clock: Callable[[], float],
        on_given_up: Callable[[], None],
        on_local_workers: Callable[[Mapping[str, str]], None],
        check_every_s: float = CHECK_EVERY_S,
    ) -> None:
        """With `check_every_s` 0 nothing is checked: dead workers are detected by their expired leases."""
        self._store = store
        self._host = host
        self._ask = ask
        self._clock = clock
        self._on_given_up = on_given_up
        self._on_local_workers = on_local_workers
        self._check_every_s = check_every_s
        self._next_s = -math.inf if check_every_s else math.inf
        self._joined = ""
        self.other_workers: int | None = None
        """The number of other leases at the last renewal; None before the first one."""

    def check_until(self, end_s: float, is_over: Callable[[], bool]) -> None:
        """Check once a second until `end_s` or `is_over()`. A worker without other workers does not check.

        Returns early when the connection was closed, also during a check: the lease must be renewed then.
        """
        connection = self._store.connections
        if not self._store.is_connected:  # Redis is unreachable; the next renewal tries again
            self._store.wait(end_s - self._clock())
        while not is_over() and (left_s := end_s - self._clock()) > 0:
            if self._store.connections != connection:
                return  # the check has made a new one
            if not self._store.is_connected or self._store.wait(min(left_s, self._next_check_in_s())):
                self._store.wait(RECONNECT_PAUSE_S)
                return
            if self._next_check_in_s() <= 0:
                self._check()

    def _next_check_in_s(self) -> float:
        """Seconds until the next check; infinite without other workers."""
        return math.inf if self.other_workers == 0 else self._next_s - self._clock()

    def report_false_alarm(self, incarnation: str) -> None:
        """Report that our lease was ended although this process lives, if another worker has ended it
        early."""
        answer: FalseAlarm | None = self._ask(lambda: self._store.run(alarm(incarnation=incarnation)))
        if answer is None:
            return
        log.warning("worker.false_alarm", incarnation=incarnation, seen_by=answer.seen_by, runs=answer.runs)
        if answer.off:
            log.error(
                "worker.looks_off",
                seen_by=answer.seen_by,
                hint="three live workers were taken for dead within an hour; "
                "for one hour dead workers are detected when their lease expires",
            )

    def _check(self) -> None:
        """Ask Redis for silent workers and handle the result."""
        self._next_s = self._clock() + self._check_every_s
        found: LookResult | None = self._ask(self._find_silent_workers)
        if found is None:
            return
        if found.next_ms is not None:
            self._next_s = min(self._next_s, self._clock() + found.next_ms / 1000)
        self._joined = found.joined
        if found.neighbours is not None:
            self._on_local_workers(found.neighbours)
        if found.given_up:
            log.warning("worker.connection_gone", incarnations=found.given_up)
            self._on_given_up()

    def _find_silent_workers(self) -> LookResult:
        """Execute the `look` script, which ends the leases of workers without a subscriber."""
        # After a failover the replica has the connection data of the former master. Connect first, so that
        # the check names the server that answers it.
        self._store.connect()
        return self._store.run(
            look(server=self._store.server, silence_ms=SILENCE_MS, host=self._host, joined=self._joined)
        )
