"""The plan-and-execute pattern: the model writes a plan, then executes its steps one after the other."""

from __future__ import annotations

from dataclasses import replace

from pydantic import BaseModel, Field

from openagents_worker.llm.base import LLMResponse
from openagents_worker.patterns.react import DEFAULT_SYSTEM_PROMPT, ReActPattern
from openagents_worker.patterns.step_limits import more_steps, step_deadline
from openagents_worker.patterns.turn import Conversation
from openagents_worker.patterns.typed_reply import ReplyType, typed_reply

__all__ = ["PlanExecutePattern"]

PLANNING = (
    "Do not answer yet. First write a plan: at most {steps} short steps, as JSON "
    '{{"steps": ["…"]}} and nothing else. Each step says what to do and with which tool. '
    "If no step is needed before the answer, the list is empty."
)
MAX_DESCRIPTION_CHARS = 200  # of a tool, in the prompt for the plan; the model gets all of it with the tools


class Plan(BaseModel):
    """The plan of a model."""

    steps: list[str]


class PlanExecutePattern(ReActPattern):
    """Plan and execute: one model call for the plan, then ReAct turns for each of its steps.

    The answer to the last step is the run's output. All model calls count as steps of the limit `max_steps`.
    """

    class Config(ReActPattern.Config):
        max_plan_steps: int = Field(10, ge=1, le=100, description="Largest number of steps of a plan.")

    async def execute(self) -> str:
        """Plan, execute the plan, and return the answer's text. Raises as `ReActPattern.execute` does, and
        `OutputValidationError` if the model writes no plan."""
        self._conversation = Conversation(
            self.context,
            system_prompt=self.cfg.system_prompt or DEFAULT_SYSTEM_PROMPT,
            question=f"{self.context.input_text}\n\n{self._instruction()}",
        )
        self._steps = 0
        await self.emit("pattern.phase", phase="planning")
        plan = await self._make_plan()
        await self.emit("pattern.plan_created", plan=plan)
        await self.emit("pattern.phase", phase="executing")
        return await self._execute_plan(plan)

    def _instruction(self) -> str:
        """The instruction to write a plan, with the tools, which are not offered for calls yet."""
        tools = [
            f"- {tool_id}: {str(tool.describe().get('description') or '')[:MAX_DESCRIPTION_CHARS]}"
            for tool_id, tool in sorted(self.context.tools.items())
        ]
        listed = ["The tools are:", *tools] if tools else []
        return "\n".join([PLANNING.format(steps=self.cfg.max_plan_steps), *listed])

    async def _make_plan(self) -> list[str]:
        reply_type = ReplyType.of(Plan)

        async def ask() -> LLMResponse:
            if self._steps == (limit := self._step_limit):
                self._extended_limit = await more_steps(self.context, limit)
            self._steps += 1
            async with step_deadline(self.context, self._steps, self.cfg.step_timeout_ms):
                await self.emit("pattern.step_started", step=self._steps)
                reply = await self._conversation.ask(
                    step=self._steps, tools=None, response_format=reply_type.form
                )
                await self.emit("pattern.step_finished", step=self._steps, action="plan")
            return replace(reply, tool_calls=())  # no tool was offered

        reply = await typed_reply(self.context, self._conversation, reply_type, ask)
        self._conversation.add_answer(reply.output_text, reply)
        plan: Plan | None = reply.structured_output
        return plan.steps[: self.cfg.max_plan_steps] if plan is not None else []

    async def _execute_plan(self, plan: list[str]) -> str:
        if not plan:
            self._conversation.add_request("Now answer.")
        for number, step in enumerate(plan, start=1):
            text = f"Step {number} of {len(plan)}: {step}"
            if number == len(plan):
                self._conversation.add_request(f"{text}\nThis is the last step: then give the final answer.")
            else:
                self._conversation.add_request(f"{text}\nDo only this step, and say what it has shown.")
                await self._run_steps(plan_step=number, is_final=False)
        return await self._run_steps(plan_step=len(plan) or None)
