"""One turn with a model: ask it, run the tool calls that it asks for, and build the next messages.

What every pattern that talks with a model needs, whatever its loop is. A tool's error is told to the model,
which may try something else. Budgets, cancellation and the runtime's own signals travel on.

A request begins with the messages of the request before it, over the turns of a session, too: providers cache
that beginning. So the system message holds only what the agent's definition says, and what a memory holds,
which may differ in every turn, stands before the question.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from openagents_worker.errors import (
    ExecutionError,
    LLMResponseError,
    OpenAgentsError,
    StepTimeoutError,
    StepTooLarge,
    ToolNotFoundError,
    ToolValidationError,
)
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import FixedMessage, LLMResponse, LLMToolCall
from openagents_worker.llm.conversation import CallIds, tool_name, usable_calls, user_text
from openagents_worker.llm.failures import is_too_long
from openagents_worker.llm.transcript import shown
from openagents_worker.models import ErrorDetails
from openagents_worker.patterns.base import RunContext
from openagents_worker.suggest import nearest

__all__ = ["CallOutcome", "Conversation", "last_error", "step_deadline", "step_limit"]

MAX_NAME_CHARS = 200  # of a name that a model invented, in what it is told

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """How one tool call ended: a result, or an error that the model is told."""

    call: LLMToolCall
    result: Any = None
    error: OpenAgentsError | None = None

    def message(self) -> FixedMessage:
        message = {"role": "tool", "tool_call_id": self.call.id, "name": tool_name(self.call.name)}
        if self.error is None:
            return FixedMessage(message, content=_text(self.result))
        told = {"error": self.error.code, "message": self.error.message}
        if self.error.hint:
            told["hint"] = self.error.hint
        return FixedMessage(message, content=dumps(told), is_error=True)


class Conversation:
    """The messages between a run and its model, from the system message to the answer."""

    def __init__(self, context: RunContext, *, system_prompt: str) -> None:
        self._context = context
        self._messages = self._opening(system_prompt)
        self._ids = CallIds(self._messages)
        self._question_at = len(self._messages)

    @property
    def calls_and_results(self) -> Messages:
        """The tool calls since the question, and their results: what the session's transcript keeps."""
        since = self._messages[self._question_at :]
        return [message for message in since if message["role"] == "tool" or "tool_calls" in message]

    def add_answer(self, text: str) -> None:
        """The model has answered in words."""
        self._messages.append(FixedMessage(role="assistant", content=text))

    def add_problem(self, problem: str) -> None:
        """Tell the model, as its user, what is wrong with its answer."""
        self._messages.append(FixedMessage(role="user", content=problem))

    # --- what the model is shown -------------------------------------------------------------------------

    def _opening(self, system_prompt: str) -> Messages:
        """System message, history, question: all that the model knows before the first step."""
        context = self._context
        system = [system_prompt, *context.system_prompt_fragments]
        return [
            FixedMessage(role="system", content="\n\n".join(system)),
            *shown(context.transcript, turns=getattr(context, "shown_turns", None)),
            FixedMessage(role="user", content=self._question()),
        ]

    def _question(self) -> str:
        """The user's text, after what the memory holds besides the conversation, which is shown already."""
        context = self._context
        question = user_text(context.input_text)
        # Where the assembler gives none of the transcript, the memory's turns are the only ones.
        repeats = getattr(context, "conversation_keys", ()) if context.transcript else ()
        held = [
            f"## {key}\n{_as_list(value)}"
            for key, value in context.memory_view.items()
            if value and key not in repeats
        ]
        return "\n\n".join([*held, f"## question\n{question}"]) if held else question

    async def ask(self, *, step: int) -> LLMResponse:
        """The model's reply. Where the request does not fit into its context, with less of the past."""
        while True:
            try:
                return await self._generate()
            except LLMResponseError as error:
                if not is_too_long(error) or not self._shorten_the_past():
                    raise
            await self._context.emit("pattern.past_shortened", step=step, messages=len(self._messages))

    def _shorten_the_past(self) -> bool:
        """Take the calls of earlier turns out, then the older half of what is left; False: nothing is left.

        The question and what was done since stay: a question that is too long by itself fails.
        """
        messages = self._messages
        past = messages[1 : self._question_at - 1]
        if not past:
            return False
        kept = [message for message in past if message["role"] != "tool" and "tool_calls" not in message]
        if len(kept) == len(past):
            questions = [at for at, message in enumerate(past) if message["role"] == "user"]
            middle = len(questions) // 2
            kept = past[questions[middle] :] if middle else []
        messages[1 : self._question_at - 1] = kept
        self._question_at -= len(past) - len(kept)
        return True

    async def _generate(self) -> LLMResponse:
        options = self._context.llm_options
        return await self._context.llm_client.generate(
            messages=list(self._messages),
            model=getattr(options, "model", None),
            temperature=getattr(options, "temperature", None),
            max_tokens=getattr(options, "max_tokens", None),
            tools=self._tool_schemas() or None,
        )

    def _tool_schemas(self) -> list[dict[str, Any]]:
        """The tools under their ids, always in one order: a prompt cache and a replay must both match."""
        return [
            {"type": "function", "function": {**tool.describe(), "name": tool_id}}
            for tool_id, tool in sorted(self._context.tools.items())
        ]

    # --- what the model asks for -------------------------------------------------------------------------

    async def run_calls(self, response: LLMResponse, *, step: int) -> list[CallOutcome]:
        """Run the tool calls of a reply, and keep them and their results for the next request."""
        calls = usable_calls(response.tool_calls, self._ids, step)
        outcomes = await self._run(calls)
        done = [outcome for outcome in outcomes if outcome.error is None]
        self._context.tool_results.extend({"tool_id": each.call.name, "result": each.result} for each in done)
        self._messages += [_assistant(response, calls), *(outcome.message() for outcome in outcomes)]
        return outcomes

    async def _run(self, calls: Sequence[LLMToolCall]) -> list[CallOutcome]:
        """The outcomes in the order of the calls; neighbours that are safe side by side run so."""
        outcomes: list[CallOutcome] = []
        for safe, neighbours in groupby(calls, key=self._is_safe):
            group = list(neighbours)
            if safe and len(group) > 1:
                outcomes += await _together([self._outcome(call) for call in group])
            else:
                outcomes += [await self._outcome(call) for call in group]
        return outcomes

    def _is_safe(self, call: LLMToolCall) -> bool:
        tool = self._context.tools.get(call.name)
        return tool is not None and tool.concurrency_safe

    async def _outcome(self, call: LLMToolCall) -> CallOutcome:
        try:
            return CallOutcome(call, result=await self._invoke(call))
        except StepTooLarge as error:
            return CallOutcome(call, error=error)
        except ExecutionError:  # of the run, not of the tool: a budget, a cancellation
            raise
        except OpenAgentsError as error:
            return CallOutcome(call, error=error)

    async def _invoke(self, call: LLMToolCall) -> Any:
        tool = self._context.tools.get(call.name)
        if tool is None:
            raise await self._refused(call, _unknown_tool(call.name, sorted(self._context.tools)))
        if call.parse_error:
            problem = f"the call cannot be read: {call.parse_error}"
            hint = "call it again with a JSON object as its arguments"
            raise await self._refused(call, ToolValidationError(problem, call.name, hint=hint))
        return await tool.invoke(dict(call.arguments), self._context)

    async def _refused(self, call: LLMToolCall, error: OpenAgentsError) -> OpenAgentsError:
        """Tell whoever watches of a call that reaches no tool."""
        await self._context.emit(
            "tool.failed",
            tool_id=call.name,
            error=str(error),
            code=error.code,
            message=error.message,
            type=type(error).__name__,
            error_details=ErrorDetails.from_exception(error).model_dump(exclude_none=True),
        )
        return error


def step_limit(context: RunContext, configured: int) -> int:
    """How many steps the run may take: as configured, or fewer where its request says so."""
    budget = getattr(context.run_request, "budget", None)
    allowed: int | None = getattr(budget, "max_steps", None)
    return configured if allowed is None else min(configured, allowed)


@asynccontextmanager
async def step_deadline(context: RunContext, step: int, limit_ms: int | None) -> AsyncIterator[None]:
    """Ends a step that takes too long; a `TimeoutError` of somebody else stays what it is.

    The runtime tries the step again later where it may; then the pattern stops here, and sees nothing.
    """
    if limit_ms is None:
        yield
        return
    error = StepTimeoutError(f"Pattern step timed out after {limit_ms}ms at step {step}", step_number=step)
    # asyncio.timeout and not wait_for, which would run the step in a task of its own: another node.
    deadline = asyncio.timeout(None)
    loop = asyncio.get_running_loop()

    def over() -> None:
        suspend_for_retry = getattr(context, "suspend_for_retry", None)
        if suspend_for_retry is None or not suspend_for_retry(error, f"step {step}"):
            deadline.reschedule(loop.time())

    timer = loop.call_later(limit_ms / 1000, over)
    try:
        async with deadline:
            yield
    except TimeoutError:
        if not deadline.expired():
            raise
        raise error from None
    finally:
        timer.cancel()


async def _together(calls: Sequence[Coroutine[Any, Any, CallOutcome]]) -> list[CallOutcome]:
    """Runs calls side by side, started in their order; when one raises, the others are ended first.

    A signal of the runtime (a BaseException that is no error and no cancellation) goes before all else.
    """
    tasks = [asyncio.create_task(call, name=f"tool-call-{n}") for n, call in enumerate(calls, start=1)]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, BaseException) and not isinstance(end, Exception | asyncio.CancelledError):
                raise end from None
        raise


def _assistant(response: LLMResponse, calls: Sequence[LLMToolCall]) -> FixedMessage:
    asked = [
        {"id": call.id, "name": tool_name(call.name), "arguments": dict(call.arguments)} for call in calls
    ]
    return FixedMessage(role="assistant", content=response.output_text, tool_calls=asked)


def _unknown_tool(name: str, known: list[str]) -> ToolNotFoundError:
    name = name[:MAX_NAME_CHARS]
    near = nearest(name, known)
    hint = f"did you mean {near!r}?" if near else f"the tools are: {', '.join(known) or 'none'}"
    return ToolNotFoundError(f"there is no tool {name!r}", name, hint=hint)


def last_error(outcomes: Sequence[CallOutcome]) -> OpenAgentsError:
    """The error of the last call that failed."""
    return next(outcome.error for outcome in reversed(outcomes) if outcome.error is not None)


def _as_list(value: Any) -> str:
    return "\n".join(f"- {_text(item)}" for item in value) if isinstance(value, list) else _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)
