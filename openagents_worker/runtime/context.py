"""What a run's own code sees: the context of the pattern, and of each tool call inside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import OpenAgentsError
from openagents_worker.llm.base import LLMClient
from openagents_worker.models import RunArtifact, RunRequest, RunUsage
from openagents_worker.patterns.base import RunTool
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.state import Overlay
from openagents_worker.runtime.storable import artifact_of

__all__ = ["CallContext", "EventBus", "RunContext"]


class EventBus:
    """`context.event_bus` of plugins written for the original SDK: emitting works, everything is recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def emit(self, event_name: str, **payload: Any) -> None:
        await self._recorder.emit(event_name, payload)


@dataclass(slots=True)
class RunContext:
    """A run as its pattern, memory and hooks see it. Made anew for every attempt."""

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
        """What the run has used so far; a copy, counted where models and tools are called."""
        return self.recorder.usage.model_copy(deep=True)

    @property
    def event_bus(self) -> EventBus:
        return EventBus(self.recorder)

    async def emit(self, event_name: str, **payload: Any) -> None:
        """An event of the pattern, stored within milliseconds; replaying it does not say it again."""
        await self.recorder.emit(event_name, payload)

    def suspend_for_retry(self, error: OpenAgentsError, part: str) -> bool:
        """Stop the run here and try it again later because of this error, as after a failed call.

        `part` is what is counted as tried. False where it may not be tried again: then the error is the
        pattern's to raise.
        """
        return self.recorder.suspend_for_retry(error, part)

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.artifacts.append(artifact_of(name, kind, payload, metadata))


class CallContext:
    """The run as one tool call sees it: state and artifacts are its own until the call is recorded."""

    def __init__(self, run: RunContext, idempotency_key: str, call_id: str) -> None:
        self._run = run
        self.state = Overlay(run.state)
        self.artifacts: list[RunArtifact] = []
        self.idempotency_key = idempotency_key
        self.call_id = call_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)  # everything else is the run's: ids, input, deps, memory_view …

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.artifacts.append(artifact_of(name, kind, payload, metadata))

    async def emit(self, event_name: str, **payload: Any) -> None:
        await self._run.emit(event_name, **payload)
