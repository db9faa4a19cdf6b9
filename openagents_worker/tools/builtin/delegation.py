"""Other agents as tools: `delegate` asks another agent, `transfer` lets another agent end the run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from openagents_worker.errors import ChildFailed, DelegationTooDeep, PermanentToolError, UserError
from openagents_worker.models import Id, RunBudget, RunResult
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec
from openagents_worker.tools.typed import TypedTool, parse_arguments, schema_of

__all__ = ["Delegate", "Transfer"]

MAX_TASK_CHARS = 100_000


class _TaskParams(TypedTool.Params):
    input_text: str = Field(
        min_length=1,
        max_length=MAX_TASK_CHARS,
        description="The task for the agent, with everything that it must know: it may not see this "
        "conversation.",
    )


class _ParamsForAny(_TaskParams):
    agent_id: Id = Field(description="The id of the agent that gets the task.")


class _ToAgent(TypedTool):
    """A tool for one agent, which the agents file names, or for any agent, which the model chooses."""

    class Params(_TaskParams):
        """The arguments if the agents file names the agent."""

    class Config(TypedTool.Config):
        agent: Id | None = Field(
            None, description="The id of the other agent. null: the model chooses it with each call."
        )
        description: str | None = Field(
            None, min_length=1, description="The description of the tool for the model. null: a general text."
        )
        session_isolation: Literal["isolated", "shared", "forked"] | None = Field(
            None,
            description="The session of the other agent: isolated (a new one), shared (that of the run), "
            "forked (a copy of it). null: multi_agent.default_session_isolation.",
        )
        budget: RunBudget | None = Field(
            None, description="The budget of its run. null: multi_agent.default_child_budget."
        )
        deps: Id | None = Field(
            None, description="The registered name of its dependencies. null: those of the run."
        )

    @property
    def _arguments(self) -> type[_TaskParams]:
        return _ParamsForAny if self.cfg.agent is None else self.Params

    def schema(self) -> dict[str, Any]:
        return schema_of(self._arguments)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "description": self.cfg.description or self.description}

    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> Any:
        arguments: Any = parse_arguments(self._arguments, params, self.tool_name)
        agent_id: str = getattr(arguments, "agent_id", self.cfg.agent)
        children = getattr(context, "children", None)
        if children is None:
            raise PermanentToolError("another agent can be asked only within a run", self.tool_name)
        request = {
            "agent_id": agent_id,
            "input_text": arguments.input_text,
            "session_isolation": self.cfg.session_isolation,
            "budget": self.cfg.budget,
            "deps": self.cfg.deps,
        }
        try:
            return await self.ask(children, request)
        except (DelegationTooDeep, UserError) as error:  # the model can choose another way
            failed = ChildFailed(error.message, self.tool_name, hint=error.hint)
            failed.child_code = error.code
            raise failed from error

    async def ask(self, children: Any, request: dict[str, Any]) -> Any:
        """The result of the tool. `children` are those of the run."""
        raise NotImplementedError


class Delegate(_ToAgent):
    """Asks another agent. The run waits for its answer without using a slot of a worker."""

    name = "delegate"
    description = "Gives a task to another agent and returns its answer."
    spec = ToolExecutionSpec(concurrency_safe=True, side_effects="agent")

    async def ask(self, children: Any, request: dict[str, Any]) -> Any:
        result: RunResult[Any] = await children.delegate(request)
        if result.ok:
            return {"answer": result.final_output}
        details, agent_id = result.error_details, request["agent_id"]
        reason = details.message if details is not None else f"it ended as {result.stop_reason}"
        failed = ChildFailed(f"the agent {agent_id!r} did not complete its task: {reason}", self.tool_name)
        failed.child_run_id, failed.stop_reason = result.run_id, result.stop_reason.value
        failed.child_code = details.code if details is not None else None
        raise failed


class Transfer(_ToAgent):
    """Lets another agent end the run: its answer becomes that of the run."""

    name = "transfer"
    description = "Hands the conversation over to another agent, which gives the final answer."
    spec = ToolExecutionSpec(side_effects="agent")

    async def ask(self, children: Any, request: dict[str, Any]) -> Any:
        await children.transfer(request)
        return {"agent": request["agent_id"]}
