"""The ReAct pattern: the model calls tools and gets their results until it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from pydantic import Field, field_validator

from openagents_worker.llm.base import LLMResponse
from openagents_worker.patterns.answers import checked_answer
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.patterns.step_limits import more_steps, step_deadline, step_limit
from openagents_worker.patterns.tool_calls import last_error
from openagents_worker.patterns.turn import Conversation, tool_schemas

__all__ = ["ReActPattern"]

DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful assistant. Use the tools you are given when they help, and answer when you know the "
    "answer. When a tool reports an error, correct the call or find another way."
)


class ReActPattern(PatternPlugin):
    """Reason and act (ReAct, https://arxiv.org/abs/2210.03629), with the provider's native tool calls."""

    class Config(PatternPlugin.Config):
        system_prompt: str | None = Field(
            None, description="The system message of every model call. null: a short default."
        )
        max_tool_errors_in_a_row: int = Field(
            5, ge=1, description="Number of steps in a row whose tools all fail, after which the run fails."
        )
        accept_truncated: bool = Field(
            False,
            description="Whether an answer that the token limit or a content filter cut is accepted. "
            "false: the run fails as llm.truncated or llm.filtered.",
        )
        native_tool_calls: bool = Field(
            True, description="Must be true: tools are called with the provider's own tool calls."
        )

        @field_validator("native_tool_calls")
        @classmethod
        def _reject_text_tool_calls(cls, native: bool) -> bool:
            if not native:
                raise ValueError("tool calls as JSON in the text are not supported; remove this setting")
            return native

    _extended_limit = 0
    """The limit of steps in the newest extension that the run has taken; 0: none."""

    async def execute(self) -> str:
        """Run steps until the model answers, and return the answer's text.

        Raises `MaxStepsExceeded`, `StepTimeoutError`, or the last tool error after too many failed steps.
        """
        self._conversation = Conversation(
            self.context, system_prompt=self.cfg.system_prompt or DEFAULT_SYSTEM_PROMPT
        )
        self._steps = 0
        return await self._run_steps()

    @property
    def _step_limit(self) -> int:
        """The largest number of steps, with the extension that the run has taken."""
        return max(step_limit(self.context, self.cfg.max_steps), self._extended_limit)

    def turn_so_far(self) -> Sequence[Mapping[str, Any]]:
        """The tool calls so far and their results. A call without a result gets one that says why."""
        return self._conversation.turn_so_far if hasattr(self, "_conversation") else ()

    async def try_again(self, problem: str) -> str:
        """Get another answer in the same conversation. `problem` says why the last one is invalid. The step
        count continues."""
        self._conversation.add_request(problem)
        return await self._run_steps()

    async def _run_steps(self, *, plan_step: int | None = None, is_final: bool = True) -> str:
        """Run steps until the model answers. `is_final`: the answer is the run's output."""
        of_plan = {} if plan_step is None else {"plan_step": plan_step}
        changed: dict[str, Any] = {} if is_final else {"tools": tool_schemas(self.context.tools) or None}
        conversation, limit = self._conversation, self._step_limit
        failed_turns = 0
        for step in count(self._steps + 1):
            if step > limit:
                limit = self._extended_limit = await more_steps(self.context, limit)
            self._steps = step
            async with step_deadline(self.context, step, self.cfg.step_timeout_ms):
                await self.emit("pattern.step_started", step=step, **of_plan)
                response = await conversation.ask(step=step, **changed)
                if not response.tool_calls and await conversation.take_steering(response.output_text):
                    await self.emit("pattern.step_finished", step=step, action="steered")
                    continue
                if not response.tool_calls:
                    answer = self._answer_in(response)
                    self.finish_reason = response.finish_reason
                    conversation.add_answer(answer, response)
                    self.turn_messages = conversation.turn_messages
                    await self.emit("pattern.step_finished", step=step, action="final")
                    return answer
                outcomes = await conversation.run_calls(response, step=step)
                await self.emit("pattern.step_finished", step=step, action="tool_calls")
            failed_turns = failed_turns + 1 if all(outcome.error for outcome in outcomes) else 0
            if failed_turns == self.cfg.max_tool_errors_in_a_row:
                raise last_error(outcomes)
        raise AssertionError("the steps are counted without end")

    def _answer_in(self, response: LLMResponse) -> str:
        """The answer. If the run has an `output_type`, the check of the output reports an empty one."""
        output_type = getattr(self.context.run_request, "output_type", None)
        return checked_answer(
            response, accept_truncated=self.cfg.accept_truncated, accept_empty=output_type is not None
        )
