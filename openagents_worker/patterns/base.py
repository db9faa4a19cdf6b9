"""The contract of a pattern: the loop between a model and its tools.

A pattern calls `context.llm_client` and `context.tools`; the runtime records these calls in the journal.
After a crash the pattern starts again from its first line, and finished calls are answered from the journal.
So a pattern needs no checkpoints of its own, but it must be deterministic apart from recorded calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, Protocol

from pydantic import Field

from openagents_worker.agents.plugin import Plugin
from openagents_worker.llm.base import LLMClient, LLMResponse, Message
from openagents_worker.models import ChildRequest, RunBudget, RunResult
from openagents_worker.tools.base import RecordedCalls

__all__ = ["PatternPlugin", "RunContext", "RunTool"]


class RunTool(Protocol):
    """A tool of a run. Its calls are recorded and validated, and its errors have codes.

    `invoke` returns the tool's result as plain JSON or raises an `OpenAgentsError`. It emits the tool's
    events and counts its usage. `concurrency_safe`: whether calls may run concurrently.
    """

    tool_id: str

    @property
    def concurrency_safe(self) -> bool: ...

    def describe(self) -> dict[str, Any]:
        """The name, description and parameters of the tool, as they are sent to the model."""
        ...

    async def invoke(self, params: dict[str, Any], context: Any = None) -> Any: ...


class RunContext(RecordedCalls, Protocol):
    """The run, as its pattern sees it."""

    agent_id: str
    session_id: str
    run_id: str
    input_text: str
    state: dict[str, Any]
    """The state of the session. Changes are stored in the session when the run completes."""
    deps: Any
    """What the factory returned that the request names with `deps` (`register_deps`); else None."""
    tools: dict[str, RunTool]
    """The tools of the agent, by id."""
    llm_client: LLMClient
    """The model of the agent. Its calls are recorded."""
    llm_options: Any
    memory_view: dict[str, Any]
    """What the memory has added, by key."""
    tool_results: list[dict[str, Any]]
    """The results of the tools that the built-in patterns have called in this run."""
    scratch: dict[str, Any]
    """For the pattern's own use. It is not stored: each attempt begins with an empty one."""
    system_prompt_fragments: list[str]
    """Texts that the built-in patterns add to the system prompt."""
    transcript: list[dict[str, Any]]
    """The messages of the session that the context assembler has selected, oldest first."""
    shown_turns: int | None
    """The number of the transcript's newest turns that are sent to the model. None: all."""
    conversation_keys: frozenset[str]
    """Keys of `memory_view` whose values repeat turns of the transcript."""
    session_artifacts: list[Any]
    assembly_metadata: dict[str, Any]
    run_request: Any
    event_bus: Any
    usage: Any
    artifacts: list[Any]

    async def emit(self, event_name: str, **payload: Any) -> None:
        """Add an event to the run. `payload` is stored as JSON. Raises `StepTooLarge`."""
        ...

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Any = None
    ) -> None:
        """Add a named output beside the answer, such as a report."""
        ...

    async def call_llm(
        self,
        prompt: str | list[Message],
        *,
        tools: Sequence[str] | None = None,
        output_type: Any = None,
        model: str | None = None,
        **options: Any,
    ) -> LLMResponse:
        """The reply of the agent's model.

        A text is sent after the system prompt, the history of the session and the contents of the memory; a
        list of messages is sent as it is. `tools` are the ids of the tools that the model may call; their
        calls are in the reply, and `call_tool` makes them. With `output_type` (a pydantic model or another
        type), `structured_output` of the reply is a value of this type; the model corrects an invalid reply,
        up to `max_validation_retries` times. `options`: temperature, max_tokens, tool_choice,
        response_format. Raises the errors of the model's client, `MaxStepsExceeded` after `max_steps` calls,
        `OutputValidationError`, `ToolNotFoundError`.
        """
        ...

    async def delegate(
        self,
        agent_id: str,
        input_text: str,
        *,
        session_isolation: Literal["isolated", "shared", "forked"] | None = None,
        budget: RunBudget | None = None,
        deps: str | None = None,
        labels: Mapping[str, str] | None = None,
        background: bool = False,
    ) -> RunResult[Any]:
        """The result of another agent, which executes as a run of its own, on any worker.

        The run is parked meanwhile. A child that fails gives a result, too: see its `stop_reason`; `output`
        raises its error. The child gets the tenant, the durability, the labels and the deps of this run, and
        at most what is left of its budget; its usage is added to that of this run. `session_isolation`:
        `isolated` (a new session), `forked` (a copy of the session) or `shared` (the session itself; such
        children are executed one after the other). With `background`, the result has only a `task_id`, for
        `task_status`. Raises `AgentNotFoundError`, `RequestInvalid`, `BudgetExhausted`, and
        `DelegationTooDeep` if too many runs are above this one.
        """
        ...

    async def delegate_many(
        self,
        requests: Sequence[ChildRequest | Mapping[str, Any]],
        *,
        max_concurrency: int | None = None,
    ) -> list[RunResult[Any]]:
        """The results of several agents, in the order of the requests; at most 1,000.

        They are executed at the same time, at most `max_concurrency` of them (None: all). One that fails does
        not stop the others: its result has the error. What is left of the budget is shared evenly among those
        that are executed at the same time and have no budget of their own. Raises `RequestInvalid`,
        `DelegationTooDeep`, `BudgetExhausted`.
        """
        ...

    async def task_status(self, task_id: str) -> Literal["running", "completed", "failed"]:
        """The state of an agent in the background, recorded. Raises `RunNotFound`."""
        ...

    async def transfer(
        self,
        agent_id: str,
        input_text: str,
        *,
        session_isolation: Literal["isolated", "shared", "forked"] | None = None,
        budget: RunBudget | None = None,
        deps: str | None = None,
    ) -> NoReturn:
        """Let another agent finish the run: its output, stop reason and error become those of this run.

        It does not return: the pattern is left when the other agent has ended. The metadata of the result has
        the id of the other run as `handoff_from`. Raises as `delegate` does, before the other agent begins.
        """
        ...


class PatternPlugin(Plugin):
    """Base class of patterns. It is optional: a class with `setup` and `execute` works too.

    The runtime creates one instance per attempt, sets `context` and awaits `execute()`. Its return value is
    the run's output. If the output does not match the request's `output_type`, the runtime awaits the
    pattern's method `try_again(problem)` for a new output. If the pattern has no such method, the runtime
    asks the model. `Config` is a pydantic model that checks the `config` object of the agents file; the
    checked values are in `self.cfg`.
    """

    context: RunContext
    turn_messages: Sequence[Mapping[str, Any]] = ()
    """The messages between question and answer, for the session's transcript: assistant messages with tool
    calls, their results, and what the user has sent to the run meanwhile. The answer may follow, if it has
    `provider_fields`. The runtime reads it after `execute` has returned."""
    finish_reason: str | None = None
    """Why the model ended its answer, for `RunResult.finish_reason`."""

    class Config(Plugin.Config):
        """The agent's `runtime` limits are added to the config; the pattern's own config overrides them."""

        max_steps: int = Field(
            16, ge=1, description="Number of steps (model turns) after which a run ends as max_steps."
        )
        step_timeout_ms: int | None = Field(
            None,
            ge=1,
            description="Milliseconds that one step may take; then it is tried again. null: no limit.",
        )

    async def execute(self) -> Any:
        """Execute the run and return its output."""
        raise NotImplementedError

    def turn_so_far(self) -> Sequence[Mapping[str, Any]]:
        """The `turn_messages` of a run that another run of its session interrupts (`on_busy="interrupt"`)."""
        return self.turn_messages

    async def emit(self, event_name: str, **payload: Any) -> None:
        await self.context.emit(event_name, **payload)

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Any = None
    ) -> None:
        self.context.add_artifact(name, kind, payload, metadata)
