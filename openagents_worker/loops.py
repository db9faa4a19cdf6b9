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
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["OnLoop", "PerLoop", "StartsAfresh", "at_fork", "http_transports"]


class OnLoop(Protocol):
    """What somebody has open on one event loop."""

    async def close(self) -> None:
        """Close it, on its loop."""
        ...

    def transports(self) -> Iterable[Any]:
        """Its asyncio transports that are open."""
        ...

    def forget(self) -> None:
        """Called when these have been closed for it, because the loop is closed."""
        ...


T = TypeVar("T", bound=OnLoop)


class PerLoop(Generic[T]):
    """One T for each event loop that asks for it. `make` is called on the loop."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._entries: _Entries[T] = {}
        weakref.finalize(self, _leave_closed, self._entries).atexit = False
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
            entry = self._entries[loop] = made, _closing(loop, self._entries, made)
        return entry[0]

    async def close(self) -> None:
        """Close the one of the running loop, and what is left of loops that are closed."""
        self.leave_closed()
        entry = self._entries.pop(asyncio.get_running_loop(), None)
        if entry is not None:
            made, life = entry
            _end(life)
            await made.close()

    def leave_closed(self) -> None:
        """Close what is left of loops that are closed."""
        _leave_closed(self._entries)

    def start_afresh(self) -> None:
        """Give up what this process has inherited, in a child that was just forked."""
        for loop in list(self._entries):
            made, life = self._entries.pop(loop)
            _end(life)
            _inherited.append((loop, made))  # collected, they would act upon the parent's selector
            for transport in made.transports():
                with suppress(OSError):  # it was closed already
                    _cut_off(transport)


_Entries = dict[asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[None]]]

_known: weakref.WeakSet[PerLoop[Any]] = weakref.WeakSet()
_knowing = threading.Lock()
_inherited: list[Any] = []


def _look_for_closed_loops() -> None:
    with _knowing:
        owners = list(_known)
    for owner in owners:
        owner.leave_closed()


def _leave_closed(entries: _Entries[Any]) -> None:
    for loop in [loop for loop in list(entries) if loop.is_closed()]:
        entry = entries.pop(loop, None)  # another thread may have been quicker
        if entry is not None:
            made, life = entry
            _end(life)
            with suppress(Exception):  # whoever asks now has nothing to do with what is left behind
                for transport in made.transports():
                    _close_without_loop(transport)
                made.forget()


def _closing(loop: asyncio.AbstractEventLoop, entries: _Entries[T], made: T) -> AsyncGenerator[None]:
    """A generator that has begun on this loop, and closes the entry when the loop ends it."""

    async def life() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            entry = entries.get(loop)
            if entry is not None and entry[0] is made:
                del entries[loop]
                await made.close()

    begun = life()
    with suppress(StopIteration):
        begun.__anext__().send(None)  # it awaits nothing before its first value
    return begun


def _end(life: AsyncGenerator[None]) -> None:
    """End a life whose entry is gone: then it awaits nothing."""
    with suppress(StopIteration):
        life.aclose().send(None)


# --- without a loop --------------------------------------------------------------------------------------


def _close_without_loop(transport: Any) -> None:
    """Close the socket of a transport whose loop is closed: its own `close` would ask the loop.

    uvloop closes all that it has with the loop.
    """
    transport = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None) or transport
    if hasattr(transport, "_call_connection_lost"):
        transport._closing = True
        with suppress(Exception):  # its protocol may want to call somebody on the loop
            transport._call_connection_lost(None)


def _cut_off(transport: Any) -> None:
    """Close a socket that a child has inherited. Its number stays taken: others still think to own it."""
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        os.dup2(nothing, transport.get_extra_info("socket").fileno(), inheritable=False)
    finally:
        os.close(nothing)


def http_transports(http: Any) -> Iterator[Any]:
    """The asyncio transports of an `httpx.AsyncHTTPTransport`."""
    for connection in http._pool.connections:
        stream: Any = getattr(getattr(connection, "_connection", None), "_network_stream", None)
        stream = getattr(stream, "_stream", None)
        while hasattr(stream, "transport_stream"):  # TLS over it
            stream = stream.transport_stream
        if hasattr(stream, "_transport"):
            yield stream._transport


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
