"""Contexts: what the code of a run sees, one object for the pattern and one for each tool call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import OpenAgentsError
from openagents_worker.llm.base import LLMClient
from openagents_worker.models import RunArtifact, RunRequest, RunUsage
from openagents_worker.patterns.base import RunTool
from openagents_worker.runtime.calls import extending, steering, waiting
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.state import Overlay
from openagents_worker.runtime.storable import artifact_of

__all__ = ["CallContext", "EventBus", "AttemptContext"]


class EventBus:
    """`context.event_bus`, for plugins written for the original SDK. It only emits events of the run."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def emit(self, event_name: str, **payload: Any) -> None:
        await self._recorder.emit(event_name, payload)


@dataclass(slots=True)
class AttemptContext:
    """A run as its pattern, memory and hooks see it. Created for each attempt."""

    run_request: RunRequest
    state: dict[str, Any]
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
    artifacts: list[RunArtifact] = field(default_factory=list)
    skill_metadata: dict[str, Any] = field(default_factory=dict)
    active_skill: str | None = None
    agent_router: Any = None
    tool_executor: Any = None
    deps: Any = None
    output_format: Mapping[str, Any] | None = None
    """The `response_format` of model calls whose reply is the run's output; None if it has no output type."""

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

    @property
    def usage(self) -> RunUsage:
        """A copy of the usage of the run so far."""
        return self.recorder.usage.model_copy(deep=True)

    @property
    def event_bus(self) -> EventBus:
        return EventBus(self.recorder)

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

    async def take_steering(self) -> list[str]:
        """The messages for the run that arrived since the last time (`RunHandle.steer`); mostly none.

        Taking some is recorded. The patterns of this library do it before each model call.
        """
        return await steering.take_steering(self.recorder)

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
        self.artifacts.append(artifact_of(name, kind, payload, metadata))


class CallContext:
    """The run as one tool call sees it. Its state and artifacts apply once the call is recorded."""

    def __init__(self, run: AttemptContext, idempotency_key: str, call_id: str) -> None:
        self._run = run
        self.state = Overlay(run.state)
        self.artifacts: list[RunArtifact] = []
        self.idempotency_key = idempotency_key
        self.call_id = call_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)  # ids, input, deps, memory_view and so on

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.artifacts.append(artifact_of(name, kind, payload, metadata))

    async def emit(self, event_name: str, **payload: Any) -> None:
        await self._run.emit(event_name, **payload)
