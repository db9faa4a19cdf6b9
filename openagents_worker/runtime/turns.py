"""Turns: answers are handed out in the order in which they were recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

__all__ = ["Turns", "resolve"]

TURNS = 25  # of the loop between two answers: what follows from the first one happens before the second


class Turns:
    """Hands out answers in order of position, each some turns of the loop after what happened before it.

    Order is given up for good once nothing has been handed out for longer than a waiting call took when it
    was made: then whoever is to come before it has a time of its own.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, positions: Iterable[int]) -> None:
        self._loop = loop
        self._positions = sorted(positions, reverse=True)
        self._remaining = set(self._positions)
        self._in_order = True
        self._turns_left = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._after_all: list[asyncio.Future[None]] = []
        self._progress = 0

    async def of(self, position: int, at_most_s: float, *, settle: bool) -> None:
        """Returns when it is this position's turn, or when order was given up.

        `settle`: others run beside the one who asks; what they do first comes first.
        """
        try:
            if self._in_order and position in self._remaining:
                if settle:
                    self._settle()
                if not self._is_turn(position):
                    future = self._waiting[position] = self._loop.create_future()
                    try:
                        await self._in_time(future, at_most_s)
                    finally:
                        self._waiting.pop(position, None)
        finally:
            self._gone(position)
        if settle and self._in_order and self._positions:
            self._settle()
        else:
            self._wake_next()

    @property
    def are_over(self) -> bool:
        """Whether every position had its turn, or order was given up: nobody waits any more."""
        return not (self._in_order and (self._positions or self._turns_left))

    async def after_all(self, at_most_s: float) -> None:
        """Returns when every position had its turn, or when order was given up."""
        if self.are_over:
            return
        future = self._loop.create_future()
        self._after_all.append(future)
        try:
            await self._in_time(future, at_most_s)
        finally:
            if future in self._after_all:
                self._after_all.remove(future)

    async def _in_time(self, future: asyncio.Future[None], at_most_s: float) -> None:
        timer: asyncio.TimerHandle

        def look(progress: int) -> None:
            nonlocal timer
            if self._progress == progress:
                self.give_up()
            else:
                timer = self._loop.call_later(at_most_s, look, self._progress)

        timer = self._loop.call_later(at_most_s, look, self._progress)
        try:
            await future
        finally:
            timer.cancel()

    def give_up(self) -> None:
        """One wait has been too long: whoever comes first is answered first, from now on."""
        self._in_order = False
        for future in (*self._waiting.values(), *self._after_all):
            resolve(future)

    def _is_turn(self, position: int) -> bool:
        return not self._turns_left and (not self._positions or self._positions[-1] >= position)

    def _gone(self, position: int) -> None:
        self._progress += 1
        self._remaining.discard(position)
        while self._positions and self._positions[-1] not in self._remaining:
            self._positions.pop()

    def _settle(self) -> None:
        if not self._turns_left:
            self._loop.call_soon(self._turn)
        self._turns_left = TURNS

    def _turn(self) -> None:
        self._turns_left -= 1
        if self._turns_left > 0:
            self._loop.call_soon(self._turn)
        else:
            self._turns_left = 0
            self._wake_next()

    def _wake_next(self) -> None:
        if self._turns_left:
            return
        if self._positions:
            future = self._waiting.get(self._positions[-1])
            if future is not None:
                resolve(future)
        else:
            for future in (*self._waiting.values(), *self._after_all):
                resolve(future)


def resolve(future: asyncio.Future[None]) -> None:
    """Let whoever waits for it go on; a future that is done stays as it is."""
    if not future.done():
        future.set_result(None)
