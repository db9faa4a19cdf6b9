"""The bridge. The only place where a Celery task body, which is synchronous, waits for a coroutine.

All runs of a process live on one asyncio loop in a thread of its own, whatever pool Celery works with.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["LoopThread", "end_task"]

T = TypeVar("T")

STOP_TIMEOUT_S = 5.0  # cancelled tasks only have to let go
CANCEL_AGAIN_S = 0.1


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel a task of ours until it has ended.

    Once is not always enough: below Python 3.12 `asyncio.wait_for` swallows a cancellation that comes in the
    moment in which it is done, and redis-py sends its commands through it.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_AGAIN_S)


class LoopThread:
    """An asyncio loop in a daemon thread; uvloop's where that is installed.

    It does not survive a fork: whoever needs one makes it in the process that uses it.
    """

    def __init__(self, name: str = "openagents-loop") -> None:
        self.loop = _new_loop()
        self._waiting: set[concurrent.futures.Future[Any]] = set()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def thread_id(self) -> int | None:
        """What `sys._current_frames()` knows the thread by; None before its start."""
        return self._thread.ident

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it in this thread.

        When the waiting thread is interrupted (SystemExit, KeyboardInterrupt, a soft time limit), the
        coroutine is cancelled and the interruption goes on. Raises `concurrent.futures.CancelledError` when
        the loop ends first.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        except RuntimeError:  # the loop is closed
            work.close()
            raise concurrent.futures.CancelledError from None
        self._waiting.add(future)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # without effect when it was the coroutine that raised
            raise
        finally:
            self._waiting.discard(future)

    def stop(self) -> None:
        """Cancel whatever still runs, so that nobody waits for ever, and end the thread."""
        if not self._thread.is_alive():
            return
        for future in list(self._waiting):
            future.cancel()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(STOP_TIMEOUT_S)

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            self._cancel_all()
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()

    def _cancel_all(self) -> None:
        endings = [end_task(task) for task in asyncio.all_tasks(self.loop)]

        async def end_all() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S / 2):
                    await asyncio.gather(*endings)

        self.loop.run_until_complete(end_all())


def _new_loop() -> asyncio.AbstractEventLoop:
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop()
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
