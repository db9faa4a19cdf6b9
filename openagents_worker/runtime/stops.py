"""Stops: the only place that limits how many runs are stopped in one turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context

__all__ = ["STOPS_A_TURN", "Stops"]

STOPS_A_TURN = 4  # stopping a run and writing its end takes the loop 4 ms, in about twenty turns


class Stops:
    """Calls functions that stop runs: the first few at once, the others in later turns of the event loop.

    A stopped run needs some more turns. A thousand runs stopped in one turn would use these turns together
    and block the loop in each of them.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._called = 0  # in this turn

    def call(self, stop: Callable[[], object]) -> None:
        """Call `stop`, now or in a later turn, in order. Must be called on the event loop."""
        if self._called == 0:
            self._schedule_next_turn()
        if self._called < STOPS_A_TURN and not self._waiting:
            self._called += 1
            stop()
        else:
            self._waiting.append(stop)

    def _schedule_next_turn(self) -> None:
        # An empty context: the context of the first caller does not belong to the other runs.
        asyncio.get_running_loop().call_soon(self._next_turn, context=Context())

    def _next_turn(self) -> None:
        self._called = 0
        while self._waiting and self._called < STOPS_A_TURN:
            if self._called == 0:
                self._schedule_next_turn()
            self._called += 1
            self._waiting.popleft()()
