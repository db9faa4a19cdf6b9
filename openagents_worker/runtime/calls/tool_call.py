"""Tool calls as the guards see them: the tool, its run, the arguments, and the order of the guards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

from openagents_worker.agents.plugin_refs import ToolRef
from openagents_worker.json_schema.rules import Schema
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import Decision, RunBudget
from openagents_worker.quick_init import quick_init
from openagents_worker.runtime.context import AttemptContext, CallContext
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.tools.base import ToolExecutionSpec, ToolPlugin
from openagents_worker.tools.checks import SchemaChecks, schema_of_tool
from openagents_worker.tools.executors import CallRules
from openagents_worker.tools.function import FunctionTool
from openagents_worker.tools.jobs import check_job_methods, is_of_job
from openagents_worker.tools.specs import spec_of
from openagents_worker.tools.toolset import Toolset

__all__ = [
    "NO_RULES",
    "BoundTool",
    "Guard",
    "Proceed",
    "ToolCall",
    "ToolPolicy",
    "ToolRun",
    "in_order",
    "is_needed",
    "needed_if",
]


@dataclass(frozen=True, slots=True)
class ToolPolicy:
    """What the agents file decides about the calls of a tool."""

    on_interrupted: Literal["ask", "rerun", "fail"] = "ask"
    approval: Literal["always", "never"] | None = None
    """None: the tool itself says whether a call needs an approval."""
    approval_timeout_ms: int | None = None
    approval_default: Literal["deny", "approve", "fail"] = "deny"
    background: bool | None = None
    """None: the tool itself says whether its calls start jobs."""

    @classmethod
    def of(cls, ref: ToolRef) -> ToolPolicy:
        approval = (ref.approval, ref.approval_timeout_ms, ref.approval_default)
        return cls(ref.on_interrupted, *approval, ref.background)


NO_RULES = CallRules()


class BoundTool:
    """A tool as an agent has it: under the agent's id for it, and with its limits."""

    def __init__(
        self,
        tool_id: str,
        plugin: Any,
        toolset: Toolset,
        *,
        timeout_ms: int | None = None,
        rules: CallRules = NO_RULES,
        policy: ToolPolicy = ToolPolicy(),
        executor: Any = None,
    ) -> None:
        """`plugin` describes the tool and has its hooks, `toolset` makes its calls.

        `timeout_ms` limits each call. None: the limit of the tool itself or, without one, the default.
        `executor` is an executor of the deployment, which makes the calls (`calls.executors`). Raises
        `PluginConfigError` for a tool that shall start jobs and cannot.
        """
        self.tool_id = tool_id
        self.plugin = plugin
        self.toolset = toolset
        described = plugin.describe() if hasattr(plugin, "describe") else {}
        self.description: Mapping[str, Any] = {**described, "name": tool_id}
        self.schema: Mapping[str, Any] = described.get("parameters") or {"type": "object"}
        self.spec = spec_of(plugin, tool_id)
        self.timeout_ms = timeout_ms or self.spec.default_timeout_ms or rules.default_timeout_ms
        self.job_limit_ms = timeout_ms or self.spec.default_timeout_ms
        self.policy = policy
        self.rules = rules
        self.executor = executor
        self.slots: asyncio.Semaphore | None = None
        """Limits the calls of this tool that are made at once. None: those of its run do."""
        self.may_need_approval = _may_need_approval(plugin, self.spec, policy)
        self.is_background = self.spec.background if policy.background is None else policy.background
        if self.is_background:
            check_job_methods(plugin, tool_id)
        may_stream = rules.may_stream and not self.is_background
        self.is_streaming = self.spec.supports_streaming and may_stream and hasattr(plugin, "invoke_stream")
        self.may_repeat = bool(getattr(plugin, "durable_idempotent", True))

    @cached_property
    def checked_schema(self) -> Schema:
        """The schema, ready for checks of arguments. Raises `PluginConfigError` if it is not accepted."""
        return schema_of_tool(self.schema)


def _may_need_approval(plugin: Any, spec: ToolExecutionSpec, policy: ToolPolicy) -> bool:
    """Whether some calls of the tool may have to wait for an approval."""
    if policy.approval is not None:
        return policy.approval == "always"
    check = getattr(type(plugin), "requires_approval", None)
    if check is FunctionTool.requires_approval:
        return plugin.has_approval_check or spec.approval_mode == "always"
    is_default = check is None or check is ToolPlugin.requires_approval
    return spec.approval_mode == "always" if is_default else True


@quick_init
@dataclass(frozen=True, slots=True)
class ToolRun:
    """What all tools of one attempt share. `guards` are the rules that each of their calls passes."""

    context: AttemptContext
    writer: RunWriter
    budget: RunBudget
    checks: SchemaChecks
    guards: Sequence[Guard]
    slots: asyncio.Semaphore | None = None
    """Limits the calls that are made at once. None: no limit."""
    warned: set[str] = field(default_factory=set)
    """Ids of tools for which an event has already warned that their side effects may happen twice."""


@dataclass(slots=True)
class ToolCall:
    """One call on its way through the guards. A guard may change the arguments for what comes after it."""

    tool: BoundTool
    run: ToolRun
    info: CallInfo
    context: CallContext
    params: dict[str, Any]
    is_announced: bool = False
    """Whether the event `tool.called` is emitted: then another event says how the call has ended."""
    decision: Decision | None = None
    """The decision about its approval."""
    has_begun: bool = False
    """Whether code of the tool was called that may have had side effects."""
    has_job: bool = False
    """Whether a job was started for it: a retryable error must not start another one."""
    executor_metadata: dict[str, Any] = field(default_factory=dict)
    """What its executor did for it, for the event of its end."""
    has_streamed: bool = False
    """Whether watchers have got pieces of its output."""

    @property
    def tool_id(self) -> str:
        return self.tool.tool_id

    @property
    def goes_on(self) -> bool:
        """Whether an earlier attempt has started a job for it: then this one only waits for its end."""
        return is_of_job(self.info.noted)


Proceed = Callable[[ToolCall], Awaitable[Any]]
"""What comes after a guard: the next guard or, after the last one, the tool. Returns the tool's result."""

Guard = Callable[[ToolCall, Proceed], Awaitable[Any]]
"""A rule that every call of a tool passes: it lets the call proceed, or raises a coded error.

A retryable error that is raised before the tool has begun suspends the run, and the next attempt makes the
call again: so a guard parks a run.
"""


def needed_if(condition: Callable[[BoundTool, ToolRun], bool]) -> Callable[[Guard], Guard]:
    """Decorator for a guard that lets the calls of some tools always proceed. These do not pass it."""

    def decorate(guard: Guard) -> Guard:
        guard.is_needed = condition  # type: ignore[attr-defined]
        return guard

    return decorate


def is_needed(guard: Guard, tool: BoundTool, run: ToolRun) -> bool:
    """Whether the calls of a tool pass this guard."""
    condition = getattr(guard, "is_needed", None)
    return condition is None or bool(condition(tool, run))


def in_order(guards: Sequence[Guard], execute: Proceed) -> Proceed:
    """The function that passes a call through all guards, the first one outermost, and then executes it."""
    for guard in reversed(guards):
        execute = partial(_call_guard, guard, execute)
    return execute


def _call_guard(guard: Guard, proceed: Proceed, call: ToolCall) -> Awaitable[Any]:
    return guard(call, proceed)
