"""Event loops. The only place that knows what was opened for which loop, and finds what a closed one left.

An event loop can end in three ways. `asyncio.run` ends the asynchronous generators that are still open: so
each entry has one, which closes it. Somebody can close a loop by hand: nothing is told of that, so closed
loops are looked for whenever an entry is made. And a process can fork: the child has the parent's loops and
sockets, and may use none of them.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["PerLoop", "StartsAfresh", "at_fork", "close_http_without_loop", "close_without_loop"]

T = TypeVar("T")


class PerLoop(Generic[T]):
    """One T for each event loop that asks for it.

    `close` closes one on its own loop. `leave` closes one whose loop is closed, or is a parent process's: it
    may neither wait nor use the loop, and must not hold whoever owns this.
    """

    def __init__(
        self, make: Callable[[], T], *, close: Callable[[T], Awaitable[None]], leave: Callable[[T], None]
    ) -> None:
        self._make = make
        self._close = close
        self._leave = leave
        self._entries: _Entries[T] = {}
        weakref.finalize(self, _leave_closed, self._entries, leave).atexit = False
        with _knowing:
            _known.add(self)
        at_fork(self)

    def here(self) -> T:
        """The one of the running loop, made when it is first asked for."""
        loop = asyncio.get_running_loop()
        entry = self._entries.get(loop)
        if entry is None:
            _look_for_closed_loops()
            made = self._make()
            entry = self._entries[loop] = made, _closing(loop, self._entries, made, self._close)
        return entry[0]

    def take(self) -> T | None:
        """The one of the running loop, which is the caller's now; None when there is none."""
        entry = self._entries.pop(asyncio.get_running_loop(), None)
        if entry is None:
            return None
        made, life = entry
        _end(life)
        return made

    def leave_closed(self) -> None:
        """Close what is left of loops that are closed."""
        _leave_closed(self._entries, self._leave)

    def start_afresh(self) -> None:
        """Close what this process has inherited, in a child that was just forked."""
        for loop in list(self._entries):
            _inherited.append(loop)  # a loop that is collected takes its readers from the parent's selector
            _leave(self._entries, loop, self._leave)


_Entries = dict[asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[None]]]

_known: weakref.WeakSet[PerLoop[Any]] = weakref.WeakSet()
_knowing = threading.Lock()
_inherited: list[asyncio.AbstractEventLoop] = []


def _look_for_closed_loops() -> None:
    with _knowing:
        owners = list(_known)
    for owner in owners:
        owner.leave_closed()


def _leave_closed(entries: _Entries[T], leave: Callable[[T], None]) -> None:
    for loop in [loop for loop in list(entries) if loop.is_closed()]:
        _leave(entries, loop, leave)


def _leave(entries: _Entries[T], loop: asyncio.AbstractEventLoop, leave: Callable[[T], None]) -> None:
    entry = entries.pop(loop, None)  # another thread may have been quicker
    if entry is not None:
        made, life = entry
        _end(life)
        with suppress(Exception):  # whoever asks now has nothing to do with what is left behind
            leave(made)


def _closing(
    loop: asyncio.AbstractEventLoop,
    entries: _Entries[T],
    made: T,
    close: Callable[[T], Awaitable[None]],
) -> AsyncGenerator[None]:
    """A generator that has begun on this loop, and closes the entry when the loop ends it."""

    async def life() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            entry = entries.get(loop)
            if entry is not None and entry[0] is made:
                del entries[loop]
                await close(made)

    begun = life()
    with suppress(StopIteration):
        begun.__anext__().send(None)  # it awaits nothing before its first value
    return begun


def _end(life: AsyncGenerator[None]) -> None:
    """End a life whose entry is gone: then it awaits nothing."""
    with suppress(StopIteration):
        life.aclose().send(None)


# --- without a loop --------------------------------------------------------------------------------------


def close_without_loop(transport: Any) -> None:
    """Close the socket of an asyncio transport whose loop is closed, or is a parent process's.

    Its own `close` would ask the loop, which refuses, or which the parent goes on using. uvloop closes all
    that it has with the loop.
    """
    transport = _under_tls(transport)
    if hasattr(transport, "_call_connection_lost"):
        transport._closing = True
        with suppress(Exception):  # its protocol may want to call somebody on the loop
            transport._call_connection_lost(None)


def close_http_without_loop(transport: Any) -> None:
    """The same for the connections of an `httpx.AsyncHTTPTransport`."""
    for connection in transport._pool.connections:
        stream: Any = getattr(getattr(connection, "_connection", None), "_network_stream", None)
        stream = getattr(stream, "_stream", None)
        while hasattr(stream, "transport_stream"):  # TLS over it
            stream = stream.transport_stream
        close_without_loop(getattr(stream, "_transport", None))


def _under_tls(transport: Any) -> Any:
    return getattr(getattr(transport, "_ssl_protocol", None), "_transport", None) or transport


# --- forks -----------------------------------------------------------------------------------------------


class StartsAfresh(Protocol):
    def start_afresh(self) -> None:
        """Called in a child that was just forked: nothing of the parent's may be used or ended."""
        ...


_start_afresh: weakref.WeakSet[StartsAfresh] = weakref.WeakSet()


def at_fork(owner: StartsAfresh) -> None:
    """Let this object start afresh in every child that is forked while it lives."""
    _hook_into_forks()
    with _knowing:
        _start_afresh.add(owner)


@cache
def _hook_into_forks() -> None:
    os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    global _knowing
    _knowing = threading.Lock()  # another thread of the parent may have held it
    for owner in list(_start_afresh):
        owner.start_afresh()
