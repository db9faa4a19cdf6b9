"""Contexts: what the code of a run sees, one object for the pattern and one for each tool call."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Any, Literal, NoReturn, ParamSpec, cast
from uuid import UUID

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import OpenAgentsError, text_of
from openagents_worker.jsontext import MAX_NESTING
from openagents_worker.llm.base import LLMClient, LLMResponse, Message
from openagents_worker.models import (
    ChildRequest,
    RunArtifact,
    RunBudget,
    RunRequest,
    RunResult,
    RunUsage,
    SessionIsolation,
)
from openagents_worker.patterns.base import RunTool
from openagents_worker.patterns.batch import call_tool_batch
from openagents_worker.patterns.calls import call_llm, call_tool
from openagents_worker.runtime.calls import closing_batch, extending, steering, waiting
from openagents_worker.runtime.original.events import OriginalEventBus
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.state import CHANGE_LEVELS, Overlay
from openagents_worker.runtime.storable import artifact_of, stored_artifact, stored_part
from openagents_worker.store.sessions import TranscriptSummary

__all__ = ["AttemptContext", "CallContext", "ContextOfRequest", "RecordedData", "writing_to"]

P = ParamSpec("P")

_writes_to: ContextVar[CallContext | None] = ContextVar("openagents_writes_to", default=None)


MAX_CHAIN = 100
"""The most tool calls in an error snapshot."""


class ContextOfRequest:
    """What every context says about the request of its run."""

    __slots__ = ()

    run_request: RunRequest

    @property
    def agent_id(self) -> str:
        return self.run_request.agent_id

    @property
    def session_id(self) -> str:
        return self.run_request.session_id

    @property
    def run_id(self) -> str:
        return self.run_request.run_id

    @property
    def input_text(self) -> str:
        return self.run_request.input_text


@dataclass(slots=True)
class AttemptContext(ContextOfRequest):
    """A run as its pattern, memory and hooks see it. Created for each attempt."""

    run_request: RunRequest
    run_state: dict[str, Any]
    """The state of the run, with the changes of all recorded calls."""
    recorder: Recorder
    llm_options: LLMOptions
    llm_client: LLMClient = None  # type: ignore[assignment]  # set once the recorded client exists
    tools: dict[str, RunTool] = field(default_factory=dict)
    memory_view: dict[str, Any] = field(default_factory=dict)
    tool_results: list[dict[str, Any]] = field(default_factory=list)
    scratch: dict[str, Any] = field(default_factory=dict)
    system_prompt_fragments: list[str] = field(default_factory=list)
    transcript: list[dict[str, Any]] = field(default_factory=list)
    shown_turns: int | None = None
    conversation_keys: frozenset[str] = frozenset()
    session_artifacts: list[Any] = field(default_factory=list)
    assembly_metadata: dict[str, Any] = field(default_factory=dict)
    new_summary: TranscriptSummary | None = None
    """The summary that was written for this run. The end of the run stores it."""
    artifacts: list[RunArtifact] = field(default_factory=list)
    skill_metadata: dict[str, Any] = field(default_factory=dict)
    active_skill: str | None = None
    agent_router: Any = None
    tool_executor: Any = None
    deps: Any = None
    output_format: Mapping[str, Any] | None = None
    """The `response_format` of model calls whose reply is the run's output; None if it has no output type."""
    system_prompt: str | None = None
    """The system prompt of the agent, for `call_llm`. Set by a pattern that is a function."""
    max_llm_calls: int | None = None
    """How many times `call_llm` may be called. None: no limit."""
    step_timeout_ms: int | None = None
    """How long one `call_llm` may take. None: no limit of its own."""
    functions: Any = None
    """The `RecordedFunctions` of the attempt."""
    children: Any = None
    """The `Children` of the attempt."""
    tool_chain: deque[tuple[str, Mapping[str, Any]]] = field(default_factory=lambda: deque(maxlen=MAX_CHAIN))
    """The newest tool calls of the run, with their arguments, for its error snapshot."""

    @property
    def state(self) -> dict[str, Any]:
        """The state of the run. Inside a recorded call: with the changes of this call."""
        call = _writes_to.get()
        if call is None or call.run is not self:
            return self.run_state
        return cast("dict[str, Any]", call.overlay)

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.run_state = state

    @property
    def usage(self) -> RunUsage:
        """A copy of the usage of the run so far."""
        return self.recorder.usage.model_copy(deep=True)

    @property
    def steps(self) -> int:
        """How many times `call_llm` was called, also inside other calls."""
        return self.recorder.counts.steps()

    def count_step(self) -> int:
        """Count a call of `call_llm`. Returns its number."""
        return self.recorder.counts.count_step()

    @property
    def event_bus(self) -> OriginalEventBus:
        return OriginalEventBus(self.recorder)

    async def emit(self, event_name: str, **payload: Any) -> None:
        """Emit an event of the run. It is stored within milliseconds. Replay does not emit it again."""
        await self.recorder.emit(event_name, payload)

    async def sleep(self, delay: float | timedelta) -> None:
        """Wait for this time: seconds, or a `timedelta`. A long wait parks the run: it holds no slot.

        Recorded: after a crash, the time is counted from where the wait began.
        """
        await waiting.sleep(self.recorder, delay)

    async def receive(
        self, name: str, *, timeout: float | timedelta | None = None, type: Any = None, default: Any = ...
    ) -> Any:
        """The next value that is sent to the run under this name. Values are kept until they are received.

        A wait parks the run: it holds no slot. `timeout`: seconds, or a `timedelta`; then `default` is
        returned, or `SignalTimeout` is raised if there is none. `type`: a type as pydantic knows them; an
        invalid value raises `RequestInvalid`.
        """
        return await waiting.receive(self.recorder, name, timeout, type, default)

    async def take_steering(self, *, new: bool = True) -> list[str]:
        """The messages for the run that arrived since the last time (`RunHandle.steer`); mostly none.

        Taking some is recorded. The patterns of this library do it before each model call. Without `new`,
        only those that an earlier attempt has taken here.
        """
        return await steering.take_steering(self.recorder, new=new)

    async def more_steps(self, limit: int, exhausted: OpenAgentsError) -> int:
        """The number of steps that the run may make, after `limit` steps.

        Waits for an extension of the budget if the budget says so; else raises `exhausted`.
        """
        return await extending.more_steps(self.recorder, limit, exhausted)

    async def now(self) -> datetime:
        """The current time (UTC), recorded: the same in every attempt."""
        return await waiting.now(self.recorder)

    def uuid4(self) -> UUID:
        """A new UUID, the same in every attempt."""
        return UUID(bytes=self.recorder.derived()[:16], version=4)

    def random(self) -> Random:
        """A new random generator, with the same numbers in every attempt."""
        return Random(self.recorder.derived())

    def suspend_for_retry(self, error: OpenAgentsError, part: str) -> bool:
        """Suspend the run because of an error and execute it again later, as after a failed call.

        Retries are counted per `part`. False if no retry is allowed: then the pattern must raise the error.
        """
        return self.recorder.suspend_for_retry(error, part)

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        call = _current_call_of(self)
        artifacts = self.artifacts if call is None else call.artifacts
        artifacts.append(artifact_of(name, kind, payload, metadata))

    # --- recorded calls ----------------------------------------------------------------------------------

    async def call_llm(
        self,
        prompt: str | list[Message],
        *,
        tools: Sequence[str] | None = None,
        output_type: Any = None,
        model: str | None = None,
        **options: Any,
    ) -> LLMResponse:
        """The reply of the agent's model; see `RunContext.call_llm`."""
        return await call_llm(
            cast("Any", self), prompt, tools=tools, output_type=output_type, model=model, **options
        )

    async def call_tool(self, tool_id: str, params: Mapping[str, Any] | None = None) -> Any:
        """The result of a tool; see `RunContext.call_tool`."""
        return await call_tool(cast("Any", self), tool_id, params)

    async def call_tool_batch(self, requests: Sequence[tuple[str, Mapping[str, Any] | None]]) -> list[Any]:
        """The results of several tool calls; see `RunContext.call_tool_batch`."""
        return await call_tool_batch(cast("Any", self), requests)

    async def close_batch(self, batch_id: str, tool_ids: Sequence[str], failures: int) -> None:
        """Record that all items of a batch have ended."""
        await closing_batch.close_batch(self.recorder, batch_id, tool_ids, failures)

    async def step(self, name: str, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """The result of a function, called once in the life of the run; see `RunContext.step`."""
        return await self.functions.call(self.functions.step(fn, name), args, kwargs)

    # --- other agents ------------------------------------------------------------------------------------

    async def delegate(
        self,
        agent_id: str,
        input_text: str,
        *,
        session_isolation: SessionIsolation | None = None,
        budget: RunBudget | None = None,
        deps: str | None = None,
        labels: Mapping[str, str] | None = None,
        background: bool = False,
    ) -> RunResult[Any]:
        """The result of another agent; see `RunContext.delegate`."""
        request = {
            "agent_id": agent_id,
            "input_text": input_text,
            "session_isolation": session_isolation,
            "budget": budget,
            "deps": deps,
            "labels": labels,
            "background": background,
        }
        return cast("RunResult[Any]", await self.children.delegate(request))

    async def delegate_many(
        self,
        requests: Sequence[ChildRequest | Mapping[str, Any]],
        *,
        max_concurrency: int | None = None,
    ) -> list[RunResult[Any]]:
        """The results of several agents; see `RunContext.delegate_many`."""
        return cast("list[RunResult[Any]]", await self.children.delegate_many(requests, max_concurrency))

    async def task_status(self, task_id: str) -> Literal["running", "completed", "failed"]:
        """The state of an agent in the background; see `RunContext.task_status`."""
        return cast('Literal["running", "completed", "failed"]', await self.children.task_status(task_id))

    async def transfer(
        self,
        agent_id: str,
        input_text: str,
        *,
        session_isolation: SessionIsolation | None = None,
        budget: RunBudget | None = None,
        deps: str | None = None,
    ) -> NoReturn:
        """Let another agent end the run; see `RunContext.transfer`."""
        request = {
            "agent_id": agent_id,
            "input_text": input_text,
            "session_isolation": session_isolation,
            "budget": budget,
            "deps": deps,
        }
        await self.children.transfer(request)
        raise AssertionError("a transfer ends the run")

    def recorded(
        self,
        fn: Callable[P, Any],
        /,
        *,
        name: str | None = None,
        idempotent: bool = True,
        timeout: float | timedelta | None = None,
        result_type: Any = None,
    ) -> Callable[P, Awaitable[Any]]:
        """The function, with recorded calls; see `RunContext.recorded`."""
        step = self.functions.step(fn, name, idempotent=idempotent, timeout=timeout, result_type=result_type)
        return cast("Callable[P, Awaitable[Any]]", self.functions.wrapped(step))


class RecordedData:
    """What recorded calls change of a run, whichever call is running now."""

    def __init__(self, context: AttemptContext) -> None:
        self._context = context

    @property
    def state(self) -> dict[str, Any]:
        return self._context.run_state

    @property
    def artifacts(self) -> list[RunArtifact]:
        return self._context.artifacts


class CallContext:
    """The run as one call of a tool or a recorded function sees it.

    Its state and artifacts apply once the call is recorded. Inside another call within this one, they are
    those of the inner call.
    """

    def __init__(self, run: AttemptContext, idempotency_key: str, call_id: str) -> None:
        self.run = run
        self.overlay = Overlay(run.run_state)
        self.artifacts: list[RunArtifact] = []
        self.idempotency_key = idempotency_key
        self.call_id = call_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run, name)  # ids, input, deps, memory_view and so on

    @property
    def state(self) -> Overlay:
        return (_current_call_of(self.run) or self).overlay

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        call = _current_call_of(self.run) or self
        call.artifacts.append(artifact_of(name, kind, payload, metadata))

    async def emit(self, event_name: str, **payload: Any) -> None:
        await self.run.emit(event_name, **payload)

    def drop_changes(self) -> None:
        """Forget the changes of the state and the artifacts of the call: it is made again."""
        self.overlay = Overlay(self.run.run_state)
        self.artifacts.clear()

    def stored_changes(self, source: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The changes of the state and the artifacts of the call, as they are stored.

        `source` names the call. Raises `StepTooDeep` or `StepTooLarge`, naming the part.
        """
        state: dict[str, Any] = {}
        for key, change in self.overlay.changes().items():
            what = f"state key {text_of(key)!r}, set by {source},"
            state |= stored_part(what, {key: change}, levels=MAX_NESTING + CHANGE_LEVELS)
        return state, [stored_artifact(artifact, source) for artifact in self.artifacts]


def _current_call_of(run: AttemptContext) -> CallContext | None:
    """The innermost call of a tool or a recorded function in which the current code executes."""
    call = _writes_to.get()
    return call if call is not None and call.run is run else None


class writing_to:
    """`with writing_to(call): …`: changes of the run's state and new artifacts belong to this call."""

    __slots__ = ("_call", "_token")

    def __init__(self, call: CallContext) -> None:
        self._call = call

    def __enter__(self) -> None:
        self._token = _writes_to.set(self._call)

    def __exit__(self, *_: object) -> None:
        _writes_to.reset(self._token)
