"""Order of outcomes: the only place that lets replay return outcomes in their recorded order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

__all__ = ["OutcomeOrder", "resolve"]

LOOP_ITERATIONS = (
    25  # iterations of the event loop between two outcomes: code after the first one executes first
)


class OutcomeOrder:
    """Lets calls return in the order of their journal positions, some iterations of the event loop apart.

    The order is given up for good if no call returned for longer than a waiting call took when it was made.
    Then a call with a lower position waits for something other than recorded calls.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, positions: Iterable[int]) -> None:
        self._loop = loop
        self._positions = sorted(positions, reverse=True)
        self._remaining = set(self._positions)
        self._in_order = True
        self._iterations_left = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._after_all: list[asyncio.Future[None]] = []
        self._progress = 0

    async def wait_for(self, position: int, at_most_s: float, *, settle: bool) -> None:
        """Wait for the turn of a position, or until the order is given up.

        `at_most_s`: how long to wait without progress. `settle`: other tasks of the run exist; let them
        execute first.
        """
        try:
            if self._in_order and position in self._remaining:
                if settle:
                    self._settle()
                if not self._is_turn(position):
                    future = self._waiting[position] = self._loop.create_future()
                    try:
                        await self._wait_while_progressing(future, at_most_s)
                    finally:
                        self._waiting.pop(position, None)
        finally:
            self._remove(position)
        if settle and self._in_order and self._positions:
            self._settle()
        else:
            self._wake_next()

    @property
    def are_over(self) -> bool:
        """Whether every position had its turn, or the order was given up."""
        return not (self._in_order and (self._positions or self._iterations_left))

    async def wait_for_all(self, at_most_s: float) -> None:
        """Wait until every position had its turn, or until the order is given up."""
        if self.are_over:
            return
        future = self._loop.create_future()
        self._after_all.append(future)
        try:
            await self._wait_while_progressing(future, at_most_s)
        finally:
            if future in self._after_all:
                self._after_all.remove(future)

    async def _wait_while_progressing(self, future: asyncio.Future[None], at_most_s: float) -> None:
        """Wait for a future. Give up the order after `at_most_s` seconds in which no call returned."""
        timer: asyncio.TimerHandle

        def check(progress: int) -> None:
            nonlocal timer
            if self._progress == progress:
                self.give_up()
            else:
                timer = self._loop.call_later(at_most_s, check, self._progress)

        timer = self._loop.call_later(at_most_s, check, self._progress)
        try:
            await future
        finally:
            timer.cancel()

    def give_up(self) -> None:
        """Give up the order: from now on calls return at once."""
        self._in_order = False
        for future in (*self._waiting.values(), *self._after_all):
            resolve(future)

    def _is_turn(self, position: int) -> bool:
        return not self._iterations_left and (not self._positions or self._positions[-1] >= position)

    def _remove(self, position: int) -> None:
        """A position had its turn, or its call was cancelled."""
        self._progress += 1
        self._remaining.discard(position)
        while self._positions and self._positions[-1] not in self._remaining:
            self._positions.pop()

    def _settle(self) -> None:
        """Let the event loop make some iterations before the next outcome."""
        if not self._iterations_left:
            self._loop.call_soon(self._on_iteration)
        self._iterations_left = LOOP_ITERATIONS

    def _on_iteration(self) -> None:
        self._iterations_left -= 1
        if self._iterations_left > 0:
            self._loop.call_soon(self._on_iteration)
        else:
            self._iterations_left = 0
            self._wake_next()

    def _wake_next(self) -> None:
        """Wake the call whose turn it is; after the last one, all that wait for the end."""
        if self._iterations_left:
            return
        if self._positions:
            future = self._waiting.get(self._positions[-1])
            if future is not None:
                resolve(future)
        else:
            for future in (*self._waiting.values(), *self._after_all):
                resolve(future)


def resolve(future: asyncio.Future[None]) -> None:
    """Set the result of a future, unless it is already done."""
    if not future.done():
        future.set_result(None)
