"""The contract of a pattern: the loop between a model and tools, written as if nothing could fail.

A pattern calls `context.llm_client` and `context.tools`; both are recorded by the runtime. After a crash it
starts again from its first line and gets every finished call from the journal, so it needs to know nothing
of checkpoints. Its only sources of chance must be recorded calls.
"""

from __future__ import annotations

from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from openagents_worker.agents.problems import checked_config
from openagents_worker.llm.base import LLMClient

__all__ = ["PatternPlugin", "RunContext", "RunTool"]


class RunTool(Protocol):
    """A tool as a pattern sees it: bound to the run, recorded, validated, its errors translated.

    `invoke` returns the tool's result as plain JSON or raises a coded error; it emits the tool's events and
    counts its usage. `concurrency_safe` says whether calls may run side by side.
    """

    tool_id: str

    @property
    def concurrency_safe(self) -> bool: ...

    def describe(self) -> dict[str, Any]: ...

    async def invoke(self, params: dict[str, Any], context: Any = None) -> Any: ...


class RunContext(Protocol):
    """What a pattern sees of its run."""

    agent_id: str
    session_id: str
    run_id: str
    input_text: str
    state: dict[str, Any]
    deps: Any
    tools: dict[str, RunTool]
    llm_client: LLMClient
    llm_options: Any
    memory_view: dict[str, Any]
    tool_results: list[dict[str, Any]]
    scratch: dict[str, Any]
    system_prompt_fragments: list[str]
    transcript: list[dict[str, Any]]
    session_artifacts: list[Any]
    assembly_metadata: dict[str, Any]
    run_request: Any
    event_bus: Any
    usage: Any
    artifacts: list[Any]

    async def emit(self, event_name: str, **payload: Any) -> None: ...

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Any = None
    ) -> None: ...


class PatternPlugin:
    """Base of a pattern; optional, a class with `setup` and `execute` will do.

    The runtime makes one instance per attempt, sets `context` and awaits `execute()`, whose return value is
    the run's output. Where it does not fit the request's `output_type`, a pattern that has a method
    `try_again(problem)` is awaited for another output; for one without, the model is asked. `Config`, a
    pydantic model, checks the `config` of the agents file; see `self.cfg`.
    """

    context: RunContext

    class Config(BaseModel):
        """The agent's `runtime` limits come with every pattern's config; a pattern's own go before them."""

        model_config = ConfigDict(extra="forbid")

        max_steps: int = Field(
            16, ge=1, description="Number of steps (model turns) after which a run ends as max_steps."
        )
        step_timeout_ms: int | None = Field(
            None,
            ge=1,
            description="Milliseconds that one step may take; then it is tried again. null: no limit.",
        )

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = dict(config or {})
        self.cfg: Any = checked_config(self.Config, self.config, type(self).__name__)

    async def execute(self) -> Any:
        """Carry the run to its answer."""
        raise NotImplementedError

    async def emit(self, event_name: str, **payload: Any) -> None:
        await self.context.emit(event_name, **payload)

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Any = None
    ) -> None:
        self.context.add_artifact(name, kind, payload, metadata)
