"""The contract of a tool: its description for the model, how it is called, and its context during a call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from typing import Any, Literal, ParamSpec, Protocol, Self, TypeVar, overload
from uuid import UUID

from pydantic import JsonValue

from openagents_worker.agents.plugin import Plugin
from openagents_worker.models.base import CheckedModel
from openagents_worker.tools.jobs import JobHandle, JobStatus

__all__ = [
    "Reconciled",
    "RecordedCalls",
    "ToolContext",
    "ToolExecutionSpec",
    "ToolPlugin",
    "WaitingContext",
]

P = ParamSpec("P")
T = TypeVar("T")


class ToolExecutionSpec(CheckedModel):
    """How a tool is executed. Calls of `concurrency_safe` tools in one model turn run concurrently.

    An unknown field raises pydantic's `ValidationError` with the field that was probably meant.
    """

    concurrency_safe: bool = False
    interrupt_behavior: Literal["cancel", "block"] = "cancel"
    """`block`: a call that is cancelled gets ten seconds to end, and is recorded. Its timeout holds."""
    side_effects: str = "unknown"
    """`none`, `network`, `files`, `processes`, `state` or another word: what calls affect, for executors."""
    approval_mode: Literal["inherit", "always", "never"] = "inherit"
    default_timeout_ms: int | None = None
    reads_files: bool = False
    writes_files: bool = False
    supports_streaming: bool = False
    """Whether the tool is called by `invoke_stream`, an async generator, in place of `invoke`."""
    cpu_bound: bool = False
    """Whether it uses much CPU time: then its function runs in another process, without a context."""
    background: bool = False
    """Whether a call starts a job by `invoke_background`, in place of `invoke`, and waits for its end."""


class WaitingContext(Protocol):
    """What the contexts of patterns and tools have in common: recorded waits, times and random values."""

    async def sleep(self, delay: float | timedelta) -> None:
        """Wait for seconds or a `timedelta`. A long wait parks the run."""
        ...

    async def receive(
        self, name: str, *, timeout: float | timedelta | None = None, type: Any = None, default: Any = ...
    ) -> Any:
        """The next value that is sent to the run under this name. Raises `SignalTimeout`."""
        ...

    async def now(self) -> datetime:
        """The current time (UTC), the same in every attempt."""
        ...

    def uuid4(self) -> UUID:
        """A new UUID, the same in every attempt."""
        ...

    def random(self) -> Random:
        """A new random generator, with the same numbers in every attempt."""
        ...


class RecordedCalls(WaitingContext, Protocol):
    """The calls of a program that are recorded, apart from those of the model."""

    async def call_tool(self, tool_id: str, params: Mapping[str, Any] | None = None) -> Any:
        """The result of a tool of the run, as JSON values. Raises its coded error, or `ToolNotFoundError`."""
        ...

    async def call_tool_batch(self, requests: Sequence[tuple[str, Mapping[str, Any] | None]]) -> list[Any]:
        """The results of several tool calls, in the order of the requests: pairs of tool id and arguments.

        Consecutive calls of `concurrency_safe` tools run concurrently, the others one after the other. Calls
        that need an approval wait for it at the same time. Each call has a record of its own: after a crash,
        only calls without a record are made. A failed call puts its coded error, an exception, in its place.
        Raises `RequestInvalid` for more than 1,000 items, and errors of the run such as `MaxStepsExceeded`.
        """
        ...

    @overload
    async def step(
        self, name: str, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...

    @overload
    async def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    async def step(self, name: str, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """The result of a function, which is not called again once its outcome is stored.

        An async function is called on the event loop, any other one in a thread. Arguments and result are
        JSON values, dataclasses, pydantic models, dates and the like. The result is converted to the type
        that the function declares. An argument that is the context itself is not part of the call's
        identity. Changes of `state` and artifacts inside the function belong to the step. Raises
        `StepFailed` for an exception of the function, and its coded errors as they are: a retryable one
        suspends the run, and the step is repeated later.
        """
        ...

    @overload
    def recorded(
        self,
        fn: Callable[P, Awaitable[T]],
        /,
        *,
        name: str | None = None,
        idempotent: bool = True,
        timeout: float | timedelta | None = None,
        result_type: Any = None,
    ) -> Callable[P, Awaitable[T]]: ...

    @overload
    def recorded(
        self,
        fn: Callable[P, T],
        /,
        *,
        name: str | None = None,
        idempotent: bool = True,
        timeout: float | timedelta | None = None,
        result_type: Any = None,
    ) -> Callable[P, Awaitable[T]]: ...

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
        """The function, made a step in each call, with its signature and docstring.

        `name`: the name of the function. `idempotent=False`: others see its effect, so it is not repeated
        after an error. If a worker dies before its outcome is stored, the run parks until somebody decides.
        `timeout`, in seconds or a `timedelta`: after it, the call raises the retryable `StepTimeoutError`.
        `result_type` replaces the declared type of the result.
        """
        ...


class ToolContext(RecordedCalls, Protocol):
    """The run that calls a tool. Changes to `state` take effect when the call is committed.

    A tool may make recorded calls itself. If a worker dies meanwhile, the tool is called again, and finished
    calls are answered from the journal.
    """

    run_id: str
    agent_id: str
    session_id: str
    input_text: str
    state: dict[str, Any]
    deps: Any

    @property
    def idempotency_key(self) -> str:
        """The same key in every attempt of this call. Send it to services that can detect a repeated call."""
        ...

    def add_artifact(
        self, name: str, kind: str = "generic", payload: Any = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Add a named output of the run beside its answer. It is stored when the call is committed."""
        ...

    async def emit(self, event_name: str, **payload: Any) -> None:
        """Add an event to the run. `payload` is stored as JSON. Raises `StepTooLarge`."""
        ...

    async def call_llm(self, prompt: str | list[Any], **options: Any) -> Any:
        """The reply of the agent's model; see `openagents_worker.RunContext`."""
        ...


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a tool has found out about an interrupted call: whether the effect has happened.

    >>> Reconciled.done({"receipt": 17}).result
    {'receipt': 17}
    """

    state: Literal["done", "not_done", "unknown"]
    result: JsonValue | JobHandle = None

    @classmethod
    def done(cls, result: JsonValue | JobHandle = None) -> Self:
        """The effect has happened. `result` becomes the result of the call. A `JobHandle` is the job that the
        call has started: its result is waited for."""
        return cls("done", result)

    @classmethod
    def not_done(cls) -> Self:
        """The effect has not happened and will not happen any more: the call is made again."""
        return cls("not_done")

    @classmethod
    def unknown(cls) -> Self:
        """The tool does not know: `on_interrupted` decides."""
        return cls("unknown")


class ToolPlugin(Plugin):
    """Base class of tools. It is optional: a class with the same methods works too (the original SDK's duck
    type).

    A subclass sets `name` and `description`, and implements `schema` and `invoke`. `Config` is a pydantic
    model that checks the `config` object of the agents file; the checked values are in `self.cfg`.
    """

    name: str = ""
    description: str = ""
    durable_idempotent: bool = True
    """Whether a call may be made again if its outcome was lost. False: it has an effect outside the run."""

    @property
    def tool_name(self) -> str:
        return self.name or type(self).__name__

    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> Any:
        """Run the tool. The result must be JSON. Raise a `ToolError` to report a failure to the model."""
        raise NotImplementedError

    def execution_spec(self) -> ToolExecutionSpec:
        """How the tool is executed: whether calls may run concurrently, what they affect, their timeout."""
        return ToolExecutionSpec()

    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the arguments, as it is sent to the model."""
        return {"type": "object", "properties": {}, "required": []}

    def describe(self) -> dict[str, Any]:
        return {"name": self.tool_name, "description": self.description, "parameters": self.schema()}

    def validate_params(self, params: dict[str, Any]) -> tuple[bool, str | None]:
        """Check what the schema cannot express. Returns (True, None), or (False, problem)."""
        return True, None

    def get_dependencies(self) -> list[str]:
        """The ids of the tools that this one calls. An agent without one of them is not accepted."""
        return []

    async def preflight(self, context: ToolContext | None) -> None:
        """Called once before the first step of a run. Raise `PermanentToolError` if the tool cannot work."""

    async def before_invoke(self, params: dict[str, Any], context: ToolContext | None) -> None:
        """Called before each `invoke`."""

    async def after_invoke(
        self,
        params: dict[str, Any],
        context: ToolContext | None,
        result: Any,
        exception: BaseException | None = None,
    ) -> None:
        """Called after each `invoke`, also after one that failed."""

    async def reconcile(
        self, params: dict[str, Any], idempotency_key: str, context: ToolContext | None
    ) -> Reconciled:
        """Find out whether an interrupted call had its effect, for example by its idempotency key.

        Called only if `durable_idempotent` is False, before `on_interrupted` of the agents file decides. An
        exception counts as unknown.
        """
        return Reconciled.unknown()

    def requires_approval(self, params: dict[str, Any], context: ToolContext | None) -> bool:
        """Whether this call waits until somebody approves it. An exception denies the call."""
        return self.execution_spec().approval_mode == "always"

    async def invoke_background(self, params: dict[str, Any], context: ToolContext | None) -> JobHandle:
        """Start a job of a service, and return what is needed to find it again.

        Called in place of `invoke` if `execution_spec().background` is true, or the agents file says so. Send
        the idempotency key of the context to the service.
        """
        raise NotImplementedError(f"{self.tool_name} does not work in the background")

    async def poll_job(self, handle: JobHandle, context: ToolContext | None) -> JobStatus:
        """Ask for the state of a job, perhaps in another process than that which started it.

        A retryable error means: ask again later. Any other error ends the call.
        """
        raise NotImplementedError(f"{self.tool_name} does not work in the background")

    async def cancel_job(self, handle: JobHandle, context: ToolContext | None) -> bool:
        """Cancel a job whose result nobody waits for. Returns whether it was still running.

        May be called again for the same job. The context of a run that has ended has its ids and its
        dependencies only. An error means: try again later.
        """
        raise NotImplementedError(f"{self.tool_name} does not work in the background")
