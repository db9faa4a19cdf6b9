"""Stops. The only place that says how many runs are stopped in one turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context

__all__ = ["STOPS_A_TURN", "Stops"]

STOPS_A_TURN = 4  # to stop a run and to write its end takes the loop 4 ms, in some twenty turns


class Stops:
    """Calls what stops a run: the first few at once, the others in the next turns of the loop.

    What a stopped run still has to do, it does in the turns that follow. A thousand that were stopped in one
    turn would go on in step, and each step would block the loop.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._called = 0  # in this turn

    def call(self, stop: Callable[[], object]) -> None:
        """Called on the loop. In the order in which they are given."""
        if self._called == 0:
            self._come_back()
        if self._called < STOPS_A_TURN and not self._waiting:
            self._called += 1
            stop()
        else:
            self._waiting.append(stop)

    def _come_back(self) -> None:
        # In a context of its own: that of whoever stops the first run is not the others'.
        asyncio.get_running_loop().call_soon(self._next_turn, context=Context())

    def _next_turn(self) -> None:
        self._called = 0
        while self._waiting and self._called < STOPS_A_TURN:
            if self._called == 0:
                self._come_back()
            self._called += 1
            self._waiting.popleft()()
