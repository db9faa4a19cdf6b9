"""Durable LLM-agent runs on plain Celery and Redis.

The public names are imported lazily: each is loaded when it is first used, so that importing a model loads
neither Celery nor Redis.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = (
    False  # type checkers recognize the name; importing `typing` would take longer than this module
)
if TYPE_CHECKING:
    from typing import Any

    from openagents_worker.agents.code import Agent, agent, register_agent
    from openagents_worker.celery.register import register
    from openagents_worker.context.base import ContextAssemblerPlugin
    from openagents_worker.errors import (
        AgentNotFoundError,
        ApprovalNotPending,
        BudgetExhausted,
        ModelRetryError,
        OpenAgentsError,
        PermanentToolError,
        RedisUnreachable,
        RequestInvalid,
        RetryableToolError,
        RunConflict,
        RunFailed,
        RunNotFound,
        SessionBusy,
        SignalTimeout,
        StepFailed,
        SubmitUnknown,
    )
    from openagents_worker.events import RunEvent
    from openagents_worker.llm.api_keys import register_api_keys
    from openagents_worker.memory.base import MemoryPlugin
    from openagents_worker.models import (
        Approval,
        ChildRequest,
        Decision,
        RunArtifact,
        RunBudget,
        RunRecord,
        RunRequest,
        RunResult,
        RunState,
        RunStreamChunk,
        RunUsage,
        StopReason,
        Waiting,
    )
    from openagents_worker.patterns.base import PatternPlugin, RunContext
    from openagents_worker.producer.client import (
        AsyncClient,
        Client,
    )
    from openagents_worker.producer.handle import (
        AsyncRunHandle,
        RunHandle,
    )
    from openagents_worker.producer.run_results import WaitTimeout
    from openagents_worker.producer.sse import sse
    from openagents_worker.producer.task import run_agent
    from openagents_worker.runtime.registry import register_deps, register_output
    from openagents_worker.tools.base import Reconciled, ToolContext, ToolExecutionSpec, ToolPlugin
    from openagents_worker.tools.function import tool

__all__ = [
    "Agent",
    "AgentNotFoundError",
    "Approval",
    "ApprovalNotPending",
    "AsyncClient",
    "AsyncRunHandle",
    "BudgetExhausted",
    "ChildRequest",
    "Client",
    "ContextAssemblerPlugin",
    "Decision",
    "MemoryPlugin",
    "ModelRetryError",
    "OpenAgentsError",
    "PatternPlugin",
    "PermanentToolError",
    "Reconciled",
    "RedisUnreachable",
    "RequestInvalid",
    "RetryableToolError",
    "RunArtifact",
    "RunBudget",
    "RunConflict",
    "RunContext",
    "RunEvent",
    "RunFailed",
    "RunHandle",
    "RunNotFound",
    "RunRecord",
    "RunRequest",
    "RunResult",
    "RunState",
    "RunStreamChunk",
    "RunUsage",
    "SessionBusy",
    "SignalTimeout",
    "StepFailed",
    "StopReason",
    "SubmitUnknown",
    "ToolContext",
    "ToolExecutionSpec",
    "ToolPlugin",
    "WaitTimeout",
    "Waiting",
    "agent",
    "register",
    "register_agent",
    "register_api_keys",
    "register_deps",
    "register_output",
    "run_agent",
    "sse",
    "tool",
]

_MODULE_OF = {
    "Agent": "agents.code",
    "AgentNotFoundError": "errors",
    "Approval": "models",
    "ApprovalNotPending": "errors",
    "AsyncClient": "producer.client",
    "AsyncRunHandle": "producer.handle",
    "BudgetExhausted": "errors",
    "ChildRequest": "models",
    "Client": "producer.client",
    "ContextAssemblerPlugin": "context.base",
    "Decision": "models",
    "MemoryPlugin": "memory.base",
    "ModelRetryError": "errors",
    "OpenAgentsError": "errors",
    "PatternPlugin": "patterns.base",
    "PermanentToolError": "errors",
    "Reconciled": "tools.base",
    "RedisUnreachable": "errors",
    "RequestInvalid": "errors",
    "RetryableToolError": "errors",
    "RunArtifact": "models",
    "RunBudget": "models",
    "RunConflict": "errors",
    "RunContext": "patterns.base",
    "RunEvent": "events",
    "RunFailed": "errors",
    "RunHandle": "producer.handle",
    "RunNotFound": "errors",
    "RunRecord": "models",
    "RunRequest": "models",
    "RunResult": "models",
    "RunState": "models",
    "RunStreamChunk": "models",
    "RunUsage": "models",
    "SessionBusy": "errors",
    "SignalTimeout": "errors",
    "StepFailed": "errors",
    "StopReason": "models",
    "SubmitUnknown": "errors",
    "ToolContext": "tools.base",
    "ToolExecutionSpec": "tools.base",
    "ToolPlugin": "tools.base",
    "WaitTimeout": "producer.run_results",
    "Waiting": "models",
    "agent": "agents.code",
    "register": "celery.register",
    "register_agent": "agents.code",
    "register_api_keys": "llm.api_keys",
    "register_deps": "runtime.registry",
    "register_output": "runtime.registry",
    "run_agent": "producer.task",
    "sse": "producer.sse",
    "tool": "tools.function",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
