"""The router of the original SDK: the only place that offers delegation under its names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from openagents_worker.errors import RunNotFound
from openagents_worker.models import RunResult
from openagents_worker.runtime.context import AttemptContext
from openagents_worker.runtime.original.package import loaded

__all__ = ["AgentRouter"]


@dataclass(slots=True)
class TaskInfo:
    """What `task_status` returns if the package is not imported."""

    task_id: str
    agent_id: str
    status: str
    output: str = ""
    error: str = ""


class AgentRouter:
    """`context.agent_router`, for patterns and tools. The argument `ctx` is not needed: it is this run."""

    def __init__(self, context: AttemptContext) -> None:
        self._children = context.children

    async def delegate(
        self,
        agent_id: str,
        input_text: str,
        ctx: Any = None,
        *,
        session_isolation: str | None = None,
        budget: Any = None,
        deps: Any = None,
        background: bool = False,
    ) -> RunResult[Any]:
        """As `RunContext.delegate`."""
        result: RunResult[Any] = await self._children.delegate(
            {
                "agent_id": agent_id,
                "input_text": input_text,
                "session_isolation": session_isolation,
                "budget": _plain(budget),
                "deps": deps,
                "background": background,
            }
        )
        return result

    async def transfer(
        self,
        agent_id: str,
        input_text: str,
        ctx: Any = None,
        *,
        session_isolation: str | None = None,
        budget: Any = None,
        deps: Any = None,
    ) -> NoReturn:
        """As `RunContext.transfer`."""
        await self._children.transfer(
            {
                "agent_id": agent_id,
                "input_text": input_text,
                "session_isolation": session_isolation,
                "budget": _plain(budget),
                "deps": deps,
            }
        )
        raise AssertionError("a transfer ends the run")

    async def task_status(self, task_id: str) -> Any:
        """What is known of a child in the background; None if the run has no such child. Recorded.

        It is a `TaskInfo` of the package, or has the same fields: the `status` is `running`, `completed` or
        `failed`, and `output` and `error` are texts.
        """
        try:
            known = await self._children.task_info(task_id)
        except RunNotFound:
            return None
        kind = loaded("interfaces.agent_router", "TaskInfo") or TaskInfo
        info = kind(task_id, known.get("agent_id", ""), known["status"])
        info.output, info.error = known.get("output", ""), known.get("error", "")
        return info


def _plain(budget: Any) -> Any:
    """A budget of the original SDK as fields: those that are set."""
    if budget is None or isinstance(budget, Mapping):
        return budget
    dump = getattr(budget, "model_dump", None)
    return dump(exclude_none=True) if dump is not None else budget
