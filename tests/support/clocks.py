"""Clocks for tests. The only place where the time of an event loop advances without waiting."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

__all__ = ["LoopClock", "run_without_waiting"]


class LoopClock:
    """The clock of the running loop. `forward` advances it, so that timers become due at once.

    Everything else on the loop is real, including its sockets.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self._ahead_s = 0.0
        self._loop.time = self._now  # type: ignore[method-assign]  # the loop is the test's own

    def forward(self, seconds: float) -> None:
        self._ahead_s += seconds

    def _now(self) -> float:
        return self._time() + self._ahead_s


def run_without_waiting(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """The result of `work`, and the seconds that it took by the clock of its loop.

    The clock stands still while a callback can run, and jumps to the next timer otherwise. `work` may use
    timers, but it must not wait for anything outside of its loop.
    """
    with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
        loop = runner.get_loop()
        began_s = loop.time()
        return runner.run(work), loop.time() - began_s


class _JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__(_JumpingSelector(self._jump))
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _jump(self, seconds: float) -> None:
        self._now_s += seconds


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting until a timer is due, it advances the clock to that time."""

    def __init__(self, jump: Any) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "deadlock: all tasks wait, and no timer is set"
        if not (ready := super().select(0)):
            self._jump(timeout)
        return ready
