"""Other agents as tools: `delegate` asks another agent, `transfer` lets another agent end the run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from openagents_worker.errors import ChildFailed, PermanentToolError
from openagents_worker.models import Id, RunBudget, RunResult
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec
from openagents_worker.tools.typed import TypedTool

__all__ = ["Delegate", "Transfer"]


class _ToAgent(TypedTool):
    """A tool for one agent, which the agents file names."""

    spec = ToolExecutionSpec(concurrency_safe=True, side_effects="agent")

    class Config(TypedTool.Config):
        agent: Id = Field(description="The id of the other agent.")
        description: str | None = Field(
            None, min_length=1, description="What the model is told about the tool. null: names the agent."
        )
        session_isolation: Literal["isolated", "shared", "forked"] | None = Field(
            None,
            description="The session of the other agent: a new one, that of the run, or a copy of it. "
            "null: multi_agent.default_session_isolation.",
        )
        budget: RunBudget | None = Field(
            None, description="The budget of its run. null: multi_agent.default_child_budget."
        )
        deps: Id | None = Field(
            None, description="The registered name of its dependencies. null: those of the run."
        )

    class Params(TypedTool.Params):
        input_text: str = Field(
            min_length=1,
            description="The task for the agent, with everything that it must know: it does not see this "
            "conversation.",
        )

    def describe(self) -> dict[str, Any]:
        text = self.cfg.description or f"{self.description} Agent: {self.cfg.agent}."
        return {**super().describe(), "description": text}

    def arguments(self, context: ToolContext | None) -> tuple[Any, dict[str, Any]]:
        """The children of the run, and the parameters that the agents file gives."""
        children = getattr(context, "children", None)
        if children is None:
            raise PermanentToolError("another agent can be asked only within a run", self.tool_name)
        config = self.cfg
        return children, {
            "agent_id": config.agent,
            "session_isolation": config.session_isolation,
            "budget": config.budget,
            "deps": config.deps,
        }


class Delegate(_ToAgent):
    """Asks another agent. The run waits for its answer without using a slot of a worker."""

    name = "delegate"
    description = "Gives a task to another agent and returns its answer."

    async def run(self, args: _ToAgent.Params, context: ToolContext | None) -> Any:
        children, fields = self.arguments(context)
        result: RunResult[Any] = await children.delegate({**fields, "input_text": args.input_text})
        if result.ok:
            return result.final_output
        details = result.error_details
        reason = details.message if details is not None else f"it ended as {result.stop_reason}"
        error = ChildFailed(
            f"the agent {self.cfg.agent!r} did not complete its task: {reason}", self.tool_name
        )
        error.child_run_id, error.stop_reason = result.run_id, result.stop_reason.value
        error.child_code = details.code if details is not None else None
        raise error


class Transfer(_ToAgent):
    """Lets another agent end the run: its answer becomes that of the run."""

    name = "transfer"
    description = "Hands the conversation over to another agent, which gives the final answer."
    spec = ToolExecutionSpec(side_effects="agent")

    async def run(self, args: _ToAgent.Params, context: ToolContext | None) -> Any:
        children, fields = self.arguments(context)
        await children.transfer({**fields, "input_text": args.input_text})
