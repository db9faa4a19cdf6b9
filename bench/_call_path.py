"""The pattern of `bench structure`. It reports its call stack and the modules that a model call executes.

Importing this module changes the event loop of the process, so only a measured worker imports it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextvars import Context, ContextVar, copy_context
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import uvloop
from greenlet import getcurrent

import openagents_worker
import tasks
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.store.batching import PipelineBatcher

PACKAGE = Path(openagents_worker.__file__).parent
REPORT = "BENCH_STRUCTURE_REPORT"
"""The environment variable with the path of the report, to which each run appends a JSON line."""

LOOP_THREAD = {"worker.loop_thread:LoopThread._main", "worker.loop_thread:_ran_without_exit"}
"""The functions that run the event loop: they are at the bottom of every stack of its thread."""

RECORDING = {"runtime.recorder", "runtime.writer"}
"""Modules on the stack of the request and of the commit; other code of the worker has none of them."""

_path: ContextVar[tuple[str, ...]] = ContextVar("_path", default=())
"""The functions of the library that scheduled the current code, directly or not; the outermost first."""


def _module(filename: str) -> str | None:
    """The dotted name of a module of the library, without the name of the package; None for other files."""
    path = Path(filename)
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts) if path.is_relative_to(PACKAGE) else None


def _frames(innermost: FrameType | None) -> Iterator[FrameType]:
    """The frames from the innermost outwards, including those of the parent greenlets."""
    waiting = getcurrent()
    while waiting is not None:
        while innermost is not None:
            yield innermost
            innermost = innermost.f_back
        waiting = waiting.parent
        innermost = None if waiting is None else waiting.gr_frame


def _call_path(innermost: FrameType | None) -> tuple[str, ...]:
    named = [(_module(frame.f_code.co_filename), frame.f_code.co_qualname) for frame in _frames(innermost)]
    hops = [f"{module}:{function}" for module, function in reversed(named) if module]
    return _path.get() + tuple(hop for hop in hops if hop not in LOOP_THREAD)


def _remember_path(context: Context | None) -> Context:
    """The context, or a copy of the caller's context, with the call path of the caller stored in it."""
    context = copy_context() if context is None else context
    context.run(_path.set, _call_path(sys._getframe(2)))
    return context


class _Loop(uvloop.Loop):  # type: ignore[misc]  # uvloop ships no types for its own loop
    """The event loop of the worker. Callbacks and tasks remember the call path that scheduled them."""

    def call_soon_threadsafe(
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Any:
        return super().call_soon_threadsafe(callback, *args, context=_remember_path(context))

    def create_task(
        self, work: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> Any:
        return super().create_task(work, name=name, context=_remember_path(context))


uvloop.new_event_loop = _Loop
app = tasks.app


class CallPath(PatternPlugin):
    """Calls the model a few times and appends a line to the report."""

    async def execute(self) -> str:
        report: dict[str, Any] = {"hops": _call_path(sys._getframe(1))}
        report["model_calls"] = [sorted(await self._modules_of_call(number)) for number in range(5)]
        with Path(os.environ[REPORT]).open("a") as file:
            file.write(json.dumps(report) + "\n")
        return "done"

    async def _modules_of_call(self, number: int) -> set[str]:
        """The modules that a model call passes through, on its way to the provider and on its way to Redis.

        A module counts if one of its functions waits for the request, or for the commit of the reply.
        """
        modules: set[str] = set()
        above = set(_modules_on_stack())

        def watched(send: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def send_and_count(*args: Any, **options: Any) -> Any:
                passed = set(_modules_on_stack())
                if not passed.isdisjoint(RECORDING):
                    modules.update(passed)
                return await send(*args, **options)

            return send_and_count

        places = ((httpx.AsyncHTTPTransport, "handle_async_request"), (PipelineBatcher, "execute"))
        originals = [getattr(owner, name) for owner, name in places]
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, watched(original))
        try:
            await self.context.llm_client.generate(messages=[{"role": "user", "content": str(number)}])
        finally:
            for (owner, name), original in zip(places, originals, strict=True):
                setattr(owner, name, original)
        return modules - above


def _modules_on_stack() -> Iterator[str]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (module := _module(frame.f_code.co_filename)) is not None:
            yield module
        frame = frame.f_back
