"""The reflexion pattern: the model reviews its answer, and improves it until it accepts it."""

from __future__ import annotations

from pydantic import AliasChoices, Field

from openagents_worker.patterns.react import ReActPattern
from openagents_worker.patterns.step_limits import step_deadline
from openagents_worker.patterns.turn import tool_schemas

__all__ = ["ReflexionPattern"]

ACCEPT = "ACCEPT"
REVIEW = (
    "Review your answer as a strict reader: is it correct, complete, and supported by what the tools have "
    f"returned? If it is, reply with the single word {ACCEPT}. Otherwise reply with what is wrong, and how "
    "to correct it."
)
IMPROVE = "A review of your answer has found this:\n{review}\nCorrect the answer, and give all of it again."


class ReflexionPattern(ReActPattern):
    """Reflexion (https://arxiv.org/abs/2303.11366): ReAct turns, and after each answer a review by the model.

    A review and each turn count as steps of the limit `max_steps`. If fewer than two steps are left, the
    answer is not reviewed.
    """

    class Config(ReActPattern.Config):
        max_reflections: int = Field(
            2,
            ge=0,
            le=20,
            validation_alias=AliasChoices("max_reflections", "max_retries"),
            description="How many times an answer may be reviewed and improved. "
            "The name in the original SDK, max_retries, is accepted too.",
        )

    async def execute(self) -> str:
        """Return the text of the first answer that its review accepts, or of the last one."""
        await self.emit("pattern.phase", phase="answering")
        answer = await super().execute()
        for _ in range(self.cfg.max_reflections):
            if self._step_limit - self._steps < 2:
                break
            await self.emit("pattern.phase", phase="reflecting")
            review = await self._review()
            if not (is_accepted := _accepts(review)):
                self._conversation.add_request(IMPROVE.format(review=review))
            # What the user has sent meanwhile is for the answer, not for its reviewer.
            if not await self._conversation.take_steering() and is_accepted:
                break
            await self.emit("pattern.phase", phase="answering")
            answer = await self._run_steps()
        return answer

    async def _review(self) -> str:
        """What the model says about the last answer. The review does not stay in the conversation."""
        self._steps += 1
        reviewed = self._conversation.copy()
        reviewed.add_request(REVIEW)
        tools = tool_schemas(self.context.tools) or None
        no_calls = {} if tools is None else {"tool_choice": "none"}  # with the tools, prompt caches hit
        async with step_deadline(self.context, self._steps, self.cfg.step_timeout_ms):
            await self.emit("pattern.step_started", step=self._steps)
            reply = await reviewed.ask(
                step=self._steps, takes_steering=False, tools=tools, response_format=None, **no_calls
            )
            await self.emit("pattern.step_finished", step=self._steps, action="reflection")
        return reply.output_text.strip()


def _accepts(review: str) -> bool:
    """Whether a review accepts the answer. A review without text has found nothing."""
    words = review.split(maxsplit=1)
    return not words or words[0].strip("*\"'.,:;!").upper() == ACCEPT
