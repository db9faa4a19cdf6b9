"""A run for tests of patterns and tools: real tools, a model that is a function, events in a list."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any

from openagents_worker.llm.base import LLMResponse, LLMToolCall
from openagents_worker.models import RunResult
from openagents_worker.patterns.base import PatternPlugin


def says(text: str) -> LLMResponse:
    return LLMResponse(output_text=text)


def asks(*calls: tuple[str, Mapping[str, Any]], text: str = "") -> LLMResponse:
    """A reply with tool calls; each is a pair of name and arguments."""
    made = [
        LLMToolCall(name=name, arguments=arguments, id=f"id-{n}") for n, (name, arguments) in enumerate(calls)
    ]
    return LLMResponse(output_text=text, tool_calls=made)


class ScriptedModel:
    """Gives its replies in order; `requests` are the keyword arguments of every call."""

    provider_name = "fake"
    model_id = "fake"

    def __init__(self, *replies: LLMResponse | Callable[[], Awaitable[LLMResponse]]) -> None:
        self._replies = list(replies)
        self.requests: list[dict[str, Any]] = []

    async def generate(self, **request: Any) -> LLMResponse:
        self.requests.append(request)
        reply = self._replies.pop(0)
        return reply if isinstance(reply, LLMResponse) else await reply()

    def count_tokens(self, text: str) -> int:
        return len(text) // 4

    async def aclose(self) -> None: ...


class BoundTool:
    """A tool bound to a run as thinly as can be: no recording, no events."""

    def __init__(self, tool_id: str, plugin: Any) -> None:
        self.tool_id = tool_id
        self._plugin = plugin

    @property
    def concurrency_safe(self) -> bool:
        safe: bool = self._plugin.execution_spec().concurrency_safe
        return safe

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = self._plugin.describe()
        return described

    async def invoke(self, params: dict[str, Any], context: Any = None) -> Any:
        return await self._plugin.invoke(params, context)


@dataclass
class FakeRun:
    """What a pattern and a tool see of a run."""

    llm_client: ScriptedModel = field(default_factory=ScriptedModel)
    tools: dict[str, Any] = field(default_factory=dict)
    input_text: str = "What is 17*23?"
    agent_id: str = "assistant"
    session_id: str = "s1"
    run_id: str = "r1"
    idempotency_key: str = "r1:u1:2"
    state: dict[str, Any] = field(default_factory=dict)
    deps: Any = None
    llm_options: Any = field(
        default_factory=lambda: SimpleNamespace(model="gpt", temperature=0.5, max_tokens=100)
    )
    memory_view: dict[str, Any] = field(default_factory=dict)
    tool_results: list[dict[str, Any]] = field(default_factory=list)
    scratch: dict[str, Any] = field(default_factory=dict)
    system_prompt_fragments: list[str] = field(default_factory=list)
    transcript: list[dict[str, Any]] = field(default_factory=list)
    session_artifacts: list[Any] = field(default_factory=list)
    assembly_metadata: dict[str, Any] = field(default_factory=dict)
    run_request: Any = None
    event_bus: Any = None
    usage: Any = None
    artifacts: list[Any] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def children(self) -> FakeRun:
        return self

    async def delegate(self, request: dict[str, Any]) -> RunResult[Any]:
        return RunResult(run_id="r1:c:1", final_output=f"done: {request['input_text']}")

    async def transfer(self, request: dict[str, Any]) -> None:
        """As if the run had ended."""

    async def emit(self, event_name: str, **payload: Any) -> None:
        self.events.append((event_name, payload))

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Any = None
    ) -> None:
        self.artifacts.append(
            {"name": name, "kind": kind, "payload": payload, "metadata": dict(metadata or {})}
        )

    def give(self, **plugins: Any) -> FakeRun:
        """Adds tools under their ids."""
        self.tools.update({tool_id: BoundTool(tool_id, plugin) for tool_id, plugin in plugins.items()})
        return self


async def execute(pattern: PatternPlugin, run: FakeRun) -> Any:
    """Executes the pattern in that run; its output."""
    pattern.context = run
    return await pattern.execute()


class Gate:
    """Counts the waiting calls and releases them when the expected number has arrived."""

    def __init__(self, expected: int) -> None:
        self.inside = 0
        self._expected = expected
        self._met = asyncio.Event()

    async def meet(self) -> None:
        self.inside += 1
        if self.inside == self._expected:
            self._met.set()
        await self._met.wait()


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that knows none of the types of the function."""

    @wraps(function)
    async def called(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return called
