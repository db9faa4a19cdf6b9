"""Plugins whose hooks raise the exception in `NEXT`. `CALLS` lists the hooks that were called."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, field_validator

from openagents_worker import tool
from openagents_worker.context.assemblers import DefaultAssembler
from openagents_worker.errors import OpenAgentsError
from openagents_worker.memory.base import MemoryPlugin
from openagents_worker.tools.base import ToolExecutionSpec, ToolPlugin
from tests.runtime.plugins import _Pattern
from tests.runtime.unstorable import EXCEPTIONS

NEXT: list[str] = []
"""The name of the exception in the table; empty: nothing is raised."""

CALLS: list[str] = []


def act(hook: str) -> None:
    CALLS.append(hook)
    if NEXT:
        raise EXCEPTIONS[NEXT[0]]()


class RaisingTool(ToolPlugin):
    """Raises in the hook that its config names."""

    description = "Raises."

    class Config(ToolPlugin.Config):
        hook: str = "invoke"
        once: bool = False

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.durable_idempotent = not self.cfg.once

    def _act(self, hook: str) -> None:
        if hook == self.cfg.hook:
            act(hook)

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(concurrency_safe=True)

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        self._act("invoke")
        return "fine"

    async def before_invoke(self, params: dict[str, Any], context: Any) -> None:
        self._act("before_invoke")

    async def after_invoke(
        self, params: dict[str, Any], context: Any, result: Any, exception: BaseException | None = None
    ) -> None:
        self._act("after_invoke")

    def requires_approval(self, params: dict[str, Any], context: Any) -> bool:
        self._act("requires_approval")
        return False

    def validate_params(self, params: dict[str, Any]) -> tuple[bool, str | None]:
        self._act("validate_params")
        return True, None

    async def preflight(self, context: Any) -> None:
        self._act("preflight")


@tool
def in_thread() -> str:
    """Raises in a thread."""
    act("thread")
    return "fine"


@tool
async def in_coroutine() -> str:
    """Raises in a coroutine."""
    act("coroutine")
    return "fine"


@tool
async def in_plain_thread() -> str:
    """Raises in a thread of asyncio."""
    await asyncio.to_thread(act, "plain thread")
    return "fine"


@tool
async def in_future() -> str:
    """Awaits a future that holds the exception."""
    CALLS.append("future")
    loop = asyncio.get_running_loop()
    future: asyncio.Future[str] = loop.create_future()
    error = EXCEPTIONS[NEXT[0]]()
    if isinstance(error, StopIteration):  # a future cannot hold StopIteration
        raise error
    loop.call_soon(future.set_exception, error)
    return await future


@tool
async def in_task() -> str:
    """Raises in a task that it starts."""

    async def work() -> None:
        act("task")

    await asyncio.create_task(work())
    return "fine"


def _cancel_myself() -> None:
    me = asyncio.current_task()
    assert me is not None
    me.cancel()


@tool
async def cancels_itself() -> str:
    """Cancels its own task."""
    _cancel_myself()
    await asyncio.sleep(0)
    return "never"


@tool
async def cancels_itself_too_late() -> str:
    """Cancels its own task and returns."""
    _cancel_myself()
    return "fine"


@tool
async def catches_its_cancellation() -> str:
    """Cancels its own task and catches the cancellation."""
    _cancel_myself()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    return "fine"


@tool(cpu_bound=True)
def in_process(name: str) -> str:
    """Raises in another process."""
    raise EXCEPTIONS[name]()


class Caller(_Pattern):
    """Calls its tool and returns the error of the tool."""

    async def execute(self) -> Any:
        arguments = {"name": NEXT[0]} if self.config.get("says_which") else {}
        try:
            return {"got": await self.context.tools["tool"].invoke(arguments)}
        except OpenAgentsError as error:
            return {"code": error.code, "message": error.message, "retryable": error.retryable}


class CallsTwice(_Pattern):
    """Calls its tool, then another one."""

    async def execute(self) -> Any:
        try:
            first = await self.context.tools["tool"].invoke({})
        except OpenAgentsError as error:
            first = error.message
        await asyncio.sleep(0)
        return [first, await self.context.tools["other"].invoke({})]


class Raiser(_Pattern):
    async def execute(self) -> Any:
        act("pattern")
        return "fine"


class Setter(_Pattern):
    async def setup(self, **_: Any) -> None:
        act("setup")

    async def execute(self) -> Any:
        return "fine"


class Closer(_Pattern):
    """Raises in `close`, after the run has its output."""

    async def execute(self) -> Any:
        return "fine"

    async def close(self) -> None:
        act("close")


class RaisingMemory(MemoryPlugin):
    external = False

    class Config(MemoryPlugin.Config):
        hook: str = "inject"

    async def inject(self, context: Any) -> None:
        if self.cfg.hook == "inject":
            act("inject")

    async def writeback(self, context: Any) -> None:
        if self.cfg.hook == "writeback":
            act("writeback")

    async def compact(self, context: Any) -> None:
        if self.cfg.hook == "compact":
            act("compact")


class ExternalMemory(RaisingMemory):
    external = True


class RaisingAssembler(DefaultAssembler):
    async def assemble(self, **given: Any) -> Any:
        act("assemble")
        return await super().assemble(**given)


class CompactingAssembler(DefaultAssembler):
    async def compact(self, **_: Any) -> None:
        act("assembler compact")


class RaisingModel:
    """A custom model client."""

    provider_name, model_id = "mine", "mine"

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        pass

    async def generate(self, **_: Any) -> Any:
        act("model")

    def count_tokens(self, text: str) -> int:
        return len(text)

    async def aclose(self) -> None: ...


class AsksModel(_Pattern):
    async def execute(self) -> Any:
        try:
            await self.context.llm_client.generate(messages=[{"role": "user", "content": "hi"}])
        except OpenAgentsError as error:
            return {"code": error.code, "message": error.message, "retryable": error.retryable}


class Answer(BaseModel):
    """An output type whose validator raises."""

    text: str

    @field_validator("text")
    @classmethod
    def _check(cls, text: str) -> str:
        act("output")
        return text


class Answering(_Pattern):
    async def execute(self) -> Any:
        return {"text": "fine"}


class FromDeps:
    """A context manager whose methods raise."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def __enter__(self) -> FromDeps:
        if self.hook == "enter":
            act("enter")
        return self

    def __exit__(self, *_: object) -> None:
        if self.hook == "exit":
            act("exit")


class FromDepsAsync(FromDeps):
    async def __aenter__(self) -> FromDeps:
        return self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()


def raising_deps() -> object:
    act("factory")
    return object()


async def raising_deps_async() -> object:
    return raising_deps()
