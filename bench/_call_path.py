"""The pattern of `bench structure`: it reports how it was reached, and what a model call passes through.

Importing this module changes how the process schedules work: only a worker that is measured imports it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context, ContextVar, copy_context
from pathlib import Path
from types import FrameType
from typing import Any

import uvloop
from greenlet import getcurrent

import openagents_worker
import tasks
from openagents_worker.patterns.base import PatternPlugin

PACKAGE = Path(openagents_worker.__file__).parent
REPORT = "BENCH_STRUCTURE_REPORT"
"""The environment variable that names the file to append a JSON line to, one for each run."""

LOOP_THREAD = {"worker.loop_thread:LoopThread._main", "worker.loop_thread:_survived"}
"""They run the event loop, so they stand below everything on its thread."""

_path: ContextVar[tuple[str, ...]] = ContextVar("_path", default=())
"""The functions of the library that led to the scheduling of what is executed now; the outermost first."""


def _module(filename: str) -> str | None:
    """The dotted name below the package; None for a file of somebody else's."""
    path = Path(filename)
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts) if path.is_relative_to(PACKAGE) else None


def _frames(innermost: FrameType | None) -> Iterator[FrameType]:
    """The frames from the innermost outwards, through the greenlets that wait for this one."""
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
    """The context, or a copy of the caller's, that knows by whom the work was scheduled."""
    context = copy_context() if context is None else context
    context.run(_path.set, _call_path(sys._getframe(2)))
    return context


class _Loop(uvloop.Loop):  # type: ignore[misc]  # uvloop ships no types for its own loop
    """The worker's event loop; whatever it schedules remembers how that came about."""

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
    """Asks the model a few times, and appends to the report what was executed."""

    async def execute(self) -> str:
        report: dict[str, Any] = {"hops": _call_path(sys._getframe(1))}
        report["model_calls"] = [sorted(await self._modules_of_call(number)) for number in range(5)]
        with Path(os.environ[REPORT]).open("a") as file:
            file.write(json.dumps(report) + "\n")
        return "done"

    async def _modules_of_call(self, number: int) -> set[str]:
        """The modules of which a function was executed on this thread, from the question to its answer."""
        modules: set[str] = set()

        def saw(frame: FrameType, event: str, _: Any) -> None:
            if event == "call" and (module := _module(frame.f_code.co_filename)) is not None:
                modules.add(module)

        sys.setprofile(saw)
        try:
            await self.context.llm_client.generate(messages=[{"role": "user", "content": str(number)}])
        finally:
            sys.setprofile(None)
        await asyncio.sleep(0.2)
        return modules
