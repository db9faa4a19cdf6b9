"""Stops: the only place that limits how many runs are stopped in one iteration of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context

__all__ = ["STOPS_PER_ITERATION", "Stops"]

STOPS_PER_ITERATION = 4  # stopping a run and writing its end takes the loop 4 ms, in about twenty iterations


class Stops:
    """Calls functions that stop runs: the first few at once, the others in later loop iterations.

    A stopped run needs some more iterations. A thousand runs stopped in one iteration would use them together
    and block the loop in each of them.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._called = 0  # in this iteration

    def call(self, stop: Callable[[], object]) -> None:
        """Call `stop`, now or in a later iteration, in order. Must be called on the event loop."""
        if self._called == 0:
            self._schedule_next_iteration()
        if self._called < STOPS_PER_ITERATION and not self._waiting:
            self._called += 1
            stop()
        else:
            self._waiting.append(stop)

    def _schedule_next_iteration(self) -> None:
        # An empty context: the context of the first caller does not belong to the other runs.
        asyncio.get_running_loop().call_soon(self._next_iteration, context=Context())

    def _next_iteration(self) -> None:
        self._called = 0
        while self._waiting and self._called < STOPS_PER_ITERATION:
            if self._called == 0:
                self._schedule_next_iteration()
            self._called += 1
            self._waiting.popleft()()
