"""Looks. The only place that gives up workers whose connection is gone, and says that we are alive.

The kernel closes the connections of a process that dies, on whatever host, and Redis sees it at once. The
heartbeat's connection listens to a channel of its own, and a look asks which of them have no listener. A live
worker whose connection was cut has a new one, and has renewed, before it is given up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from openagents_worker.store.scripts import FalseAlarm, LookResult, alarm, look
from openagents_worker.store.subscribed import SubscribedStore
from openagents_worker.telemetry.logs import get_logger

__all__ = ["LOOK_EVERY_S", "RENEWAL_GRACE_MS", "Looks"]

log = get_logger(__name__)

LOOK_EVERY_S = 1.0
SILENCE_MS = 2_000  # a connection is made anew in milliseconds; here is time for a machine that is very busy
RENEWAL_GRACE_MS = 1_000  # a renewal may come so much later than a heartbeat after the one before
RECONNECT_PAUSE_S = 0.05  # between a connection that was closed and the next one


class Looks:
    """What the heartbeat's thread does between two beats. All its methods are called in that thread.

    `ask` asks the store, and returns None when there is no answer; `on_given_up`: a lease was ended.
    """

    def __init__(
        self,
        store: SubscribedStore,
        *,
        host: str,
        ask: Callable[[Callable[[], Any]], Any],
        clock: Callable[[], float],
        on_given_up: Callable[[], None],
        on_neighbours: Callable[[Mapping[str, str]], None],
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        """`look_every_s` 0: nobody is looked for, dead workers are noticed by their leases alone."""
        self._store = store
        self._host = host
        self._ask = ask
        self._clock = clock
        self._on_given_up = on_given_up
        self._on_neighbours = on_neighbours
        self._look_every_s = look_every_s
        self._next_s = -math.inf if look_every_s else math.inf
        self._joined = ""
        self.others: int | None = None
        """How many other leases the last renewal has counted; None: nobody has counted them yet."""

    def until(self, end_s: float, is_over: Callable[[], bool]) -> None:
        """Look once a second until this time or until `is_over()`. A worker without others does not look.

        A connection that is closed meanwhile, also under a look, ends it before: it is time to renew.
        """
        connection = self._store.connections
        if not self._store.is_connected:  # Redis is away; the next renewal tries again
            self._store.wait(end_s - self._clock())
        while not is_over() and (left_s := end_s - self._clock()) > 0:
            if self._store.connections != connection:
                return  # the look has made another one
            if not self._store.is_connected or self._store.wait(min(left_s, self._next_look_in_s())):
                self._store.wait(RECONNECT_PAUSE_S)
                return
            if self._next_look_in_s() <= 0:
                self._look()

    def _next_look_in_s(self) -> float:
        return math.inf if self.others == 0 else self._next_s - self._clock()

    def say_alive(self, incarnation: str) -> None:
        """Our lease is over although we live: if somebody has ended it early, that was a mistake."""
        said: FalseAlarm | None = self._ask(lambda: self._store.run(alarm(incarnation=incarnation)))
        if said is None:
            return
        log.warning("worker.false_alarm", incarnation=incarnation, seen_by=said.seen_by, runs=said.runs)
        if said.off:
            log.error(
                "worker.looks_off",
                seen_by=said.seen_by,
                hint="three live workers were taken for dead within an hour; "
                "for an hour dead ones are noticed at the end of their lease",
            )

    def _look(self) -> None:
        self._next_s = self._clock() + self._look_every_s
        looked: LookResult | None = self._ask(self._ask_for_silent_ones)
        if looked is None:
            return
        if looked.next_s is not None:
            self._next_s = min(self._next_s, self._clock() + looked.next_s)
        self._joined = looked.joined
        if looked.neighbours is not None:
            self._on_neighbours(looked.neighbours)
        if looked.given_up:
            log.warning("worker.connection_gone", incarnations=looked.given_up)
            self._on_given_up()

    def _ask_for_silent_ones(self) -> LookResult:
        # What a former master knew of connections, its replica knows, too: it must not be asked in that name.
        self._store.connect()
        return self._store.run(
            look(server=self._store.server, silence_ms=SILENCE_MS, host=self._host, joined=self._joined)
        )
