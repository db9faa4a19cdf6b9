"""Dependencies. The only place that makes what a run's tools are given, and takes it back."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from openagents_worker.errors import DepsUnavailable, OpenAgentsError, PatternError
from openagents_worker.runtime.registry import DEPS
from openagents_worker.runtime.user_code import described, executing, user_code

__all__ = ["opened_deps"]

LIMIT_S = 30.0  # nobody can cancel a run, or stop its worker, while what it is given is made or closed

InThread = Callable[..., Awaitable[Any]]


@asynccontextmanager
async def opened_deps(name: str | None, in_thread: InThread) -> AsyncGenerator[Any]:
    """What is registered under that name, for as long as the block lasts; None without a name.

    Raises `PluginLoadError` for a name that nobody knows and `DepsUnavailable`, or the factory's own coded
    error, where it cannot be made.
    """
    if name is None:
        yield None
        return
    factory = DEPS.get(name)
    with (
        executing("deps", name),
        user_code(PatternError, prefix=f"deps {name!r} cannot be made: "),  # whatever is not an Exception
    ):
        try:
            async with asyncio.timeout(LIMIT_S):
                made = await _made(factory, in_thread)
                value = await _enter(made, in_thread)
        except OpenAgentsError:
            raise
        except Exception as error:
            raise DepsUnavailable(f"deps {name!r} cannot be made: {described(error)}") from error
    try:
        yield value
    except BaseException as error:
        await _leave(made, error, in_thread)
        raise  # whatever it says: no context manager turns a failed run into a completed one
    await _leave(made, None, in_thread)


async def _made(factory: Callable[[], Any], in_thread: InThread) -> Any:
    made = factory() if inspect.iscoroutinefunction(factory) else await in_thread(factory)
    return await made if inspect.isawaitable(made) and not hasattr(made, "__aenter__") else made


async def _enter(made: Any, in_thread: InThread) -> Any:
    if hasattr(made, "__aenter__"):
        return await made.__aenter__()
    return await in_thread(made.__enter__) if hasattr(made, "__enter__") else made


async def _leave(made: Any, error: BaseException | None, in_thread: InThread) -> None:
    raised = (None, None, None) if error is None else (type(error), error, error.__traceback__)
    async with asyncio.timeout(LIMIT_S):
        if hasattr(made, "__aenter__"):
            await made.__aexit__(*raised)
        elif hasattr(made, "__enter__"):
            await in_thread(lambda: made.__exit__(*raised))
