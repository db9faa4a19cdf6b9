"""Dependencies: the only place that creates `context.deps` for a run, and closes it after the attempt."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Self

from openagents_worker.errors import DepsUnavailable, OpenAgentsError, PatternError
from openagents_worker.runtime.registry import DEPS
from openagents_worker.runtime.user_code import described, executing

__all__ = ["OpenDeps", "opened_deps"]

LIMIT_S = 30.0  # a run cannot be cancelled while its dependencies are created or closed

InThread = Callable[..., Awaitable[Any]]


class OpenDeps:
    """`async with OpenDeps() as deps: …`: what `deps.open` has opened is closed after the block."""

    __slots__ = ("_opened",)

    def __init__(self) -> None:
        self._opened: AbstractAsyncContextManager[Any] | None = None

    async def open(self, name: str, in_thread: InThread) -> Any:
        """The dependencies registered under a name. Raises as `opened_deps` does."""
        opened = opened_deps(name, in_thread)
        value = await opened.__aenter__()
        self._opened = opened
        return value

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: Any) -> None:
        if self._opened is not None:
            await self._opened.__aexit__(*error)


@asynccontextmanager
async def opened_deps(name: str | None, in_thread: InThread) -> AsyncGenerator[Any]:
    """The dependencies registered under a name, for the duration of the block; None without a name.

    Raises `PluginLoadError` for an unknown name. If the factory fails, raises its coded error or
    `DepsUnavailable`.
    """
    if name is None:
        yield None
        return
    factory = DEPS.get(name)
    prefix = f"deps {name!r} cannot be created: "
    with executing("deps", name, wrap=PatternError, prefix=prefix):  # also for a BaseException
        try:
            async with asyncio.timeout(LIMIT_S):
                resource = await _call_factory(factory, in_thread)
                value = await _enter(resource, in_thread)
        except OpenAgentsError:
            raise
        except Exception as error:
            raise DepsUnavailable(f"deps {name!r} cannot be created: {described(error)}") from error
    try:
        yield value
    except BaseException as error:
        await _exit(resource, error, in_thread)
        raise  # a context manager cannot turn a failed run into a completed one
    await _exit(resource, None, in_thread)


async def _call_factory(factory: Callable[[], Any], in_thread: InThread) -> Any:
    """Call the factory: an async one on the event loop, any other in a thread."""
    resource = factory() if inspect.iscoroutinefunction(factory) else await in_thread(factory)
    return (
        await resource if inspect.isawaitable(resource) and not hasattr(resource, "__aenter__") else resource
    )


async def _enter(resource: Any, in_thread: InThread) -> Any:
    if hasattr(resource, "__aenter__"):
        return await resource.__aenter__()
    return await in_thread(resource.__enter__) if hasattr(resource, "__enter__") else resource


async def _exit(resource: Any, error: BaseException | None, in_thread: InThread) -> None:
    exc_info = (None, None, None) if error is None else (type(error), error, error.__traceback__)
    async with asyncio.timeout(LIMIT_S):
        if hasattr(resource, "__aenter__"):
            await resource.__aexit__(*exc_info)
        elif hasattr(resource, "__enter__"):
            await in_thread(lambda: resource.__exit__(*exc_info))
