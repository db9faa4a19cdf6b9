"""Calls in progress: the only place that knows which recorded calls of a run can still end by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from typing import Any

__all__ = ["CallInProgress", "CallsInProgress"]


class CallInProgress:
    """`with CallInProgress(calls): …` counts a call as in progress while the block makes it.

    It is blocked while a call inside it waits for the run to stop, because then it cannot end by itself.
    """

    __slots__ = ("_calls", "_token", "blocked", "call_id", "goes_on", "may_repeat", "outer", "task")

    def __init__(self, calls: CallsInProgress, *, call_id: str, may_repeat: bool) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[Any] = task
        self.outer = _innermost_call.get()
        self.call_id = call_id
        self.may_repeat = may_repeat
        self.blocked = 0
        self.goes_on = False
        """Whether calls inside it may begin although the run stops: else it could not end."""
        self._calls = calls
        self._token: Token[CallInProgress | None] | None = None

    def __enter__(self) -> None:
        if self._calls.is_closed and not self._calls.goes_on:
            raise asyncio.CancelledError
        self._token = _innermost_call.set(self)
        self._calls.add(self)

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _innermost_call.reset(self._token)
        self._calls.discard(self)


_innermost_call: ContextVar[CallInProgress | None] = ContextVar("openagents_running", default=None)


class CallsInProgress:
    """The calls of one attempt that are being made."""

    def __init__(self) -> None:
        self._calls: set[CallInProgress] = set()
        self._stopping = asyncio.Event()
        self._none_can_end = asyncio.Event()
        self._none_can_end.set()
        self._blocking = 0
        self._none_blocks = asyncio.Event()
        self.begun = 0
        """How many calls were begun so far."""
        self.is_closed = False
        """Whether no call begins any more, but inside a call that goes on."""
        self.when_none_can_end: Callable[[], object] = lambda: None
        """Called each time when calls are in progress and none of them can end by itself."""
        self.when_blocked: Callable[[], object] = lambda: None
        self.when_unblocked: Callable[[], object] = lambda: None
        """Called for each call that cannot end by itself any more, and that can again."""

    def add(self, call: CallInProgress) -> None:
        self._calls.add(call)
        self.begun += 1
        self._none_can_end.clear()

    def discard(self, call: CallInProgress) -> None:
        self._calls.discard(call)
        self._signal_if_none_can_end()

    def close(self) -> None:
        """The program has ended. Calls with effects go on, with the calls inside them. No other call begins:
        `CancelledError` is raised in its place."""
        self.is_closed = True
        for call in self.with_effects():
            call.goes_on = True

    def unblocked(self) -> int:
        """The number of calls that can end by themselves."""
        return sum(not call.blocked for call in self._calls)

    def may_repeat(self) -> bool:
        """Whether every call may be made again, although it may have had side effects."""
        return all(call.may_repeat for call in self._calls)

    def with_effects(self) -> list[CallInProgress]:
        """The calls that must not be made again without permission."""
        return [call for call in self._calls if not call.may_repeat]

    @property
    def goes_on(self) -> bool:
        """Whether the current code executes inside a call that goes on until it ends, or until the stop."""
        call = None if self._stopping.is_set() else _innermost_call.get()
        while call is not None and not call.goes_on:
            call = call.outer
        return call is not None

    async def wait_for_stop(self) -> None:
        """Wait until the calls of the run are cancelled. The calls around the current one are blocked."""
        with _outer_calls_blocked(self):
            await self._stopping.wait()

    async def wait(self) -> None:
        """Return when no call can end by itself any more."""
        await self._none_can_end.wait()

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """A context manager: its block makes a call that ends before a cancellation takes effect."""
        self._blocking += 1
        self._none_blocks.clear()
        try:
            yield
        finally:
            self._blocking -= 1
            if not self._blocking:
                self._none_blocks.set()

    async def wait_for_blocking(self, at_most_s: float) -> None:
        """Wait until no call blocks a cancellation any more."""
        if self._blocking:
            with suppress(TimeoutError):
                async with asyncio.timeout(at_most_s):
                    await self._none_blocks.wait()

    def cancel(self) -> None:
        """Cancel all calls, and resume those that wait for the stop."""
        self._stopping.set()
        for call in list(self._calls):
            call.task.cancel()

    @property
    def none_can_end(self) -> bool:
        """Whether no call can end by itself. A call that waits for a fact or a time cannot."""
        return self._none_can_end.is_set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context manager: the current call and the calls around it cannot end while its block waits."""
        try:
            with _outer_calls_blocked(self):
                yield
        finally:
            if self.unblocked():
                self._none_can_end.clear()

    def _signal_if_none_can_end(self) -> None:
        if not self._calls:
            self._none_can_end.set()
        elif all(call.blocked for call in self._calls):
            self._none_can_end.set()
            self.when_none_can_end()


@contextmanager
def _outer_calls_blocked(calls: CallsInProgress) -> Iterator[None]:
    outer = []
    call = _innermost_call.get()
    while call is not None:
        call.blocked += 1
        if call.blocked == 1:
            calls.when_blocked()
        outer.append(call)
        call = call.outer
    calls._signal_if_none_can_end()
    try:
        yield
    finally:
        for call in outer:
            call.blocked -= 1
            if call.blocked == 0:
                calls.when_unblocked()
