"""Waits of replay: the only place where a call waits until other tasks of the run have made progress."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from openagents_worker.runtime.latch import Latch
from openagents_worker.runtime.turns import resolve

__all__ = ["QUIET_S", "ReplayWaits"]

QUIET_S = 5.0  # after so long without progress, a call no longer waits for other nodes


class ReplayWaits:
    """The calls of a run that wait, by the keys that wake them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, latch: Latch) -> None:
        self.in_flight = 0
        """The number of calls that are being made."""
        self._loop = loop
        self._latch = latch
        self._last_progress_s = loop.time()
        self._waiting: dict[Hashable, list[asyncio.Future[None]]] = defaultdict(list)

    def note_progress(self) -> None:
        self._last_progress_s = self._loop.time()

    async def until(
        self,
        condition: Callable[[], bool],
        keys: Sequence[Hashable],
        *,
        at_most_s: float | None = None,
        check_on_progress: bool = False,
    ) -> bool:
        """Wait for a condition. False if the run is latched or makes no progress, or after `at_most_s`.

        The condition is checked when one of `keys` is woken; with `check_on_progress`, when any key is.
        """
        began_s = self._loop.time()
        if check_on_progress:
            keys = [*keys, "any"]
        while not condition():
            now_s = self._loop.time()
            left_s = QUIET_S if self.in_flight else self._last_progress_s + QUIET_S - now_s
            if at_most_s is not None:
                left_s = min(left_s, began_s + at_most_s - now_s)
            if left_s <= 1e-6 or self._latch.reason is not None:
                return False
            await self._wait_for(keys, left_s)
        return True

    async def _wait_for(self, keys: Sequence[Hashable], at_most_s: float) -> None:
        """Wait until one of the keys is woken, at most `at_most_s` seconds."""
        waiting: asyncio.Future[None] = self._loop.create_future()
        for key in (*keys, "latch"):
            self._waiting[key].append(waiting)
        timer = self._loop.call_later(at_most_s, resolve, waiting)
        try:
            await waiting
        finally:
            timer.cancel()
            for key in (*keys, "latch"):
                futures = self._waiting.get(key)
                if futures is not None:
                    if waiting in futures:
                        futures.remove(waiting)
                    if not futures:
                        del self._waiting[key]

    def wake(self, key: Hashable) -> None:
        """Wake the calls that wait for this key, or for any."""
        for each in (key, "any"):
            for waiting in self._waiting.get(each, ()):
                resolve(waiting)

    def wake_all(self) -> None:
        for futures in self._waiting.values():
            for waiting in futures:
                resolve(waiting)
