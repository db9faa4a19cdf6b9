"""An event loop in a thread of its own: the only place where a library that may block the loop is awaited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import suppress
from contextvars import copy_context
from typing import Any, TypeVar

__all__ = ["LibraryThread"]

T = TypeVar("T")
END = object()


class LibraryThread:
    """Runs coroutines in a thread. What they block is this thread, and no other run of the process.

    A call that is cancelled is cancelled there, too. Tasks that a library leaves behind end with `aclose`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the coroutine that `make` returns; it is made and awaited in the thread."""
        context = copy_context()
        return await asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(_in(context, make), self._running())
        )

    async def items(self, make: Callable[[], AsyncIterator[T]]) -> AsyncGenerator[T, None]:
        """The items of the iterator that `make` returns. It ends in the thread if this one is closed."""
        here, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        async def pump() -> None:
            async for item in make():
                here.call_soon_threadsafe(queue.put_nowait, item)

        pumping = asyncio.ensure_future(self.call(pump))
        pumping.add_done_callback(lambda _: queue.put_nowait(END))
        try:
            while (item := await queue.get()) is not END:
                yield item
            await pumping
        finally:
            pumping.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await pumping

    async def aclose(self) -> None:
        """End the thread and the tasks in it. The next call starts another one."""
        with self._starting:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            with suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(loop.stop)
            await asyncio.to_thread(thread.join)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None or self._thread is None or not self._thread.is_alive():  # also after a fork
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_serve, args=(self._loop,), name=self._name, daemon=True
                )
                self._thread.start()
            return self._loop


async def _in(context: Any, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Await in a copy of the caller's context: its variables say which call is running."""
    return await asyncio.get_running_loop().create_task(make(), context=context)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
