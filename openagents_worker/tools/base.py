"""The contract of a tool: what the model is told of it, how it is called, what it may use while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from openagents_worker.agents.problems import checked_config

__all__ = ["ToolContext", "ToolExecutionSpec", "ToolPlugin"]


class ToolExecutionSpec(BaseModel):
    """How a tool wants to be run. `concurrency_safe` tools of one model turn run side by side."""

    model_config = ConfigDict(frozen=True)

    concurrency_safe: bool = False
    interrupt_behavior: Literal["cancel", "block"] = "cancel"
    side_effects: str = "unknown"
    approval_mode: Literal["inherit", "always", "never"] = "inherit"
    default_timeout_ms: int | None = None
    reads_files: bool = False
    writes_files: bool = False
    supports_streaming: bool = False
    cpu_bound: bool = False
    """It computes for long: its function runs in another process, without a context."""


class ToolContext(Protocol):
    """What a tool sees of the run that calls it. Changes to `state` count once the call is committed."""

    run_id: str
    agent_id: str
    session_id: str
    input_text: str
    state: dict[str, Any]
    deps: Any

    @property
    def idempotency_key(self) -> str:
        """The same in every attempt of this call; send it to whoever can recognise a repeat."""
        ...

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Mapping[str, Any] | None = None
    ) -> None: ...

    async def emit(self, event_name: str, **payload: Any) -> None: ...


class ToolPlugin:
    """Base of a tool; optional, a class with the same methods will do (the original SDK's duck type).

    A subclass sets `name` and `description`, says its `schema()` and implements `invoke`. `Config`, a
    pydantic model, checks the `config` object of the agents file; the checked values are `self.cfg`.
    """

    name: str = ""
    description: str = ""
    durable_idempotent: bool = True
    """Whether the call may run again when its outcome was lost. False for effects others can see."""

    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = dict(config or {})
        self.cfg: Any = checked_config(self.Config, self.config, type(self).__name__)

    @property
    def tool_name(self) -> str:
        return self.name or type(self).__name__

    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> Any:
        """Run the tool; the result must be JSON. Raise a `ToolError` to tell the model what went wrong."""
        raise NotImplementedError

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec()

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the arguments, as the model gets it."""
        return {"type": "object", "properties": {}, "required": []}

    def describe(self) -> dict[str, Any]:
        return {"name": self.tool_name, "description": self.description, "parameters": self.schema()}

    def validate_params(self, params: dict[str, Any]) -> tuple[bool, str | None]:
        """Checks beyond the schema: (fine, None) or (not, what is wrong)."""
        return True, None

    async def preflight(self, context: ToolContext | None) -> None:
        """Called once before the first step of a run; raise `PermanentToolError` when it cannot work."""

    async def before_invoke(self, params: dict[str, Any], context: ToolContext | None) -> None:
        """Called before each call."""

    async def after_invoke(
        self,
        params: dict[str, Any],
        context: ToolContext | None,
        result: Any,
        exception: BaseException | None = None,
    ) -> None:
        """Called after each call, however it ended."""

    def requires_approval(self, params: dict[str, Any], context: ToolContext | None) -> bool:
        return self.execution_spec().approval_mode == "always"


ToolFactory = Callable[..., Any]
