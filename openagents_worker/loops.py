"""Event loops. The only place that keeps resources per event loop and closes them when the loop ends.

An event loop can end in three ways. `asyncio.run` closes the asynchronous generators that are still open:
therefore each resource has a generator that closes it. Code can close a loop directly, without a
notification: therefore closed loops are searched for whenever a resource is made. And a process can fork: the
child inherits the loops and sockets of its parent, but must not use them.
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

__all__ = ["LoopResource", "PerLoop", "StartsAfresh", "at_fork", "http_transports"]


class LoopResource(Protocol):
    """A resource that belongs to one event loop, for example a connection pool."""

    async def close(self) -> None:
        """Close the resource. It is called on its loop."""
        ...

    def transports(self) -> Iterable[Any]:
        """The open asyncio transports of the resource."""
        ...

    def forget(self) -> None:
        """Forget the transports. It is called after they were closed because the loop is closed."""
        ...


T = TypeVar("T", bound=LoopResource)


class PerLoop(Generic[T]):
    """One resource for each event loop. `make` creates it, and is called on that loop."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._entries: _Entries[T] = {}
        weakref.finalize(self, _close_entries_of_closed_loops, self._entries).atexit = False
        with _lock:
            _instances.add(self)
        at_fork(self)

    def here(self) -> T:
        """The resource of the running loop. The first call makes it."""
        loop = asyncio.get_running_loop()
        entry = self._entries.get(loop)
        if entry is None:
            _close_resources_of_closed_loops()
            made = self._make()
            entry = self._entries[loop] = made, _closing_generator(loop, self._entries, made)
        return entry[0]

    async def close(self) -> None:
        """Close the resource of the running loop, and the resources of closed loops."""
        self.close_closed_loops()
        entry = self._entries.pop(asyncio.get_running_loop(), None)
        if entry is not None:
            made, generator = entry
            _end_generator(generator)
            await made.close()

    def close_closed_loops(self) -> None:
        """Close the resources of closed loops."""
        _close_entries_of_closed_loops(self._entries)

    def start_afresh(self) -> None:
        """Drop the inherited resources in a process that was just forked."""
        for loop in list(self._entries):
            made, generator = self._entries.pop(loop)
            _end_generator(generator)
            # Keep a reference: their finalizers would change the selector of the parent.
            _inherited.append((loop, made))
            for transport in made.transports():
                with suppress(OSError):  # the socket is already closed
                    _close_inherited_socket(transport)


_Entries = dict[asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[None]]]

_instances: weakref.WeakSet[PerLoop[Any]] = weakref.WeakSet()
_lock = threading.Lock()
_inherited: list[Any] = []


def _close_resources_of_closed_loops() -> None:
    with _lock:
        owners = list(_instances)
    for owner in owners:
        owner.close_closed_loops()


def _close_entries_of_closed_loops(entries: _Entries[Any]) -> None:
    for loop in [loop for loop in list(entries) if loop.is_closed()]:
        entry = entries.pop(loop, None)  # another thread may have removed it
        if entry is not None:
            made, generator = entry
            _end_generator(generator)
            with suppress(Exception):  # an error of a closed loop must not fail the current caller
                for transport in made.transports():
                    _close_without_loop(transport)
                made.forget()


def _closing_generator(
    loop: asyncio.AbstractEventLoop, entries: _Entries[T], made: T
) -> AsyncGenerator[None]:
    """A generator that was started on this loop. When the loop closes it, it closes the resource."""

    async def life() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            entry = entries.get(loop)
            if entry is not None and entry[0] is made:
                del entries[loop]
                await made.close()

    generator = life()
    with suppress(StopIteration):
        generator.__anext__().send(None)  # it awaits nothing before its first value
    return generator


def _end_generator(generator: AsyncGenerator[None]) -> None:
    """End the generator of a resource that was removed. It awaits nothing then."""
    with suppress(StopIteration):
        generator.aclose().send(None)


# --- without a loop --------------------------------------------------------------------------------------


def _close_without_loop(transport: Any) -> None:
    """Close the socket of a transport whose loop is closed. Its own `close` needs a running loop.

    uvloop closes its transports together with the loop.
    """
    transport = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None) or transport
    if hasattr(transport, "_call_connection_lost"):
        transport._closing = True
        with suppress(Exception):  # its protocol may try to schedule a callback on the closed loop
            transport._call_connection_lost(None)


def _close_inherited_socket(transport: Any) -> None:
    """Close an inherited socket. Its file descriptor stays in use, because other objects still refer to
    it."""
    null_device = os.open(os.devnull, os.O_RDWR)
    try:
        os.dup2(null_device, transport.get_extra_info("socket").fileno(), inheritable=False)
    finally:
        os.close(null_device)


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
        """Drop what was inherited, in a process that was just forked. The parent still uses it: do not close
        it."""
        ...


_restarted_after_fork: weakref.WeakSet[StartsAfresh] = weakref.WeakSet()


def at_fork(owner: StartsAfresh) -> None:
    """Call `owner.start_afresh()` in every process that is forked while `owner` exists."""
    _register_fork_hook()
    with _lock:
        _restarted_after_fork.add(owner)


@cache
def _register_fork_hook() -> None:
    os.register_at_fork(after_in_child=_start_afresh_in_child)


def _start_afresh_in_child() -> None:
    """Called in the child after each fork of this process."""
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    for owner in list(_restarted_after_fork):
        owner.start_afresh()
