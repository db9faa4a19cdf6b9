"""One turn with a model: send a request, run the tool calls of the reply, and build the next messages.

All patterns that use a model share this code. A tool's error is sent to the model, which may try something
else. Budget errors, cancellation and the runtime's own signals are raised.

Each request begins with the messages of the previous request, also across the turns of a session, because
providers cache that prefix. So the system message contains only parts of the agent's definition. The contents
of the memory, which may change in every turn, precede the question.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType
from typing import Any

from openagents_worker.errors import (
    ExecutionError,
    LLMReplyEmpty,
    LLMReplyFiltered,
    LLMReplyRefused,
    LLMReplyTruncated,
    LLMResponseError,
    MaxStepsExceeded,
    OpenAgentsError,
    StepTimeoutError,
    StepTooLarge,
    ToolCancelledError,
    ToolNotFoundError,
    ToolValidationError,
)
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import FinishReason, FixedMessage, LLMResponse, LLMToolCall
from openagents_worker.llm.conversation import (
    UniqueCallIds,
    assistant_message,
    is_blank,
    tool_name,
    usable_calls,
    user_text,
)
from openagents_worker.llm.failures import is_too_long
from openagents_worker.llm.messages import result_content
from openagents_worker.llm.transcript import answer_fields, model_messages
from openagents_worker.models import ErrorDetails
from openagents_worker.patterns.base import RunContext, RunTool
from openagents_worker.patterns.call_order import begin_together
from openagents_worker.suggest import did_you_mean

__all__ = [
    "Conversation",
    "ToolCallOutcome",
    "checked_answer",
    "last_error",
    "more_steps",
    "step_deadline",
    "step_limit",
    "tool_schemas",
    "unknown_tool",
]

MAX_NAME_CHARS = 200  # of an unknown tool name, in the error for the model
MAX_REFUSAL_CHARS = 500  # of the model's words, in the error of the run

INTERRUPTED_CALL = "the run was interrupted before this call had ended; it may have had an effect"
NOT_CALLED = "the run was interrupted before this call began"
"""Results of calls in the turn of an interrupted run, for the model."""

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ToolCallOutcome:
    """The outcome of one tool call: a result, or an error that is sent to the model."""

    call: LLMToolCall
    result: Any = None
    error: OpenAgentsError | None = None

    def message(self) -> FixedMessage:
        message = {"role": "tool", "tool_call_id": self.call.id, "name": tool_name(self.call.name)}
        if self.error is None:
            content = result_content(self.result)  # blocks, if the result has images or files
            return FixedMessage(message, content=_text(self.result) if content is None else content)
        problem = {"error": self.error.code, "message": self.error.message}
        if self.error.hint:
            problem["hint"] = self.error.hint
        return FixedMessage(message, content=dumps(problem), is_error=True)


class Conversation:
    """The messages between a run and its model, from the system message to the answer."""

    def __init__(
        self,
        context: RunContext,
        *,
        system_prompt: str | None = None,
        question: str | None = None,
        messages: Messages | None = None,
    ) -> None:
        """`question` replaces the user's text. With `messages`, the conversation begins with these alone."""
        self._context = context
        self._question_text = context.input_text if question is None else question
        self._past_at = 0
        self._messages = self._first_messages(system_prompt) if messages is None else messages
        self._ids = UniqueCallIds(self._messages)
        self._question_at = len(self._messages) if messages is None else 1
        self._is_cut = False
        self._turn: Messages = []
        self._unfinished: tuple[FixedMessage, Sequence[LLMToolCall]] | None = None
        self._outcomes: dict[str | None, ToolCallOutcome | None] = {}
        """The outcomes of the calls of the current reply, by call id. None: the call has begun."""

    @property
    def turn_messages(self) -> Messages:
        """What the session's transcript stores of the turn: the tool calls after the question, their results,
        the messages that were sent to the run meanwhile with the answers that they followed, and the answer
        if it has opaque fields."""
        return [*self._turn, *(message for message in self._messages[-1:] if "provider_fields" in message)]

    @property
    def turn_so_far(self) -> Messages:
        """The same while calls are running: each of these has a result that says that it was interrupted."""
        if self._unfinished is None:
            return list(self._turn)
        message, calls = self._unfinished
        outcomes = [self._outcomes.get(call.id) or self._interrupted(call) for call in calls]
        return [*self._turn, message, *(outcome.message() for outcome in outcomes)]

    def _interrupted(self, call: LLMToolCall) -> ToolCallOutcome:
        problem = INTERRUPTED_CALL if call.id in self._outcomes else NOT_CALLED
        return ToolCallOutcome(call, error=ToolCancelledError(problem, call.name))

    def add_answer(self, text: str, reply: LLMResponse) -> None:
        """Append the model's answer, with the opaque fields that its provider wants back."""
        fields = answer_fields(reply)
        message = FixedMessage(role="assistant", content=text)
        self._messages.append(FixedMessage(message, provider_fields=fields) if fields else message)

    def add_request(self, text: str) -> None:
        """Append a user message that says what to do next, or what is wrong with the model's answer."""
        self._messages.append(FixedMessage(role="user", content=text))

    def add_to_question(self, text: str) -> None:
        """Append a paragraph to the last message if it is a user's text, else a user message.

        Not to the system message: providers cache what precedes the question.
        """
        last = self._messages[-1] if self._messages else {}
        if last.get("role") == "user" and isinstance(last.get("content"), str):
            self._messages[-1] = FixedMessage({**last, "content": f"{last['content']}\n\n{text}"})
        else:
            self.add_request(text)

    def copy(self) -> Conversation:
        """Another conversation that begins with these messages."""
        other = copy.copy(self)
        other._messages = list(self._messages)
        return other

    # --- requests ----------------------------------------------------------------------------------------

    def _first_messages(self, system_prompt: str | None) -> Messages:
        """The messages of the first request: system message, history, question."""
        context = self._context
        system = [*([] if system_prompt is None else [system_prompt]), *context.system_prompt_fragments]
        instructions = [FixedMessage(role="system", content="\n\n".join(system))] if system else []
        self._past_at = len(instructions)
        return [
            *instructions,
            *model_messages(context.transcript, turns=getattr(context, "shown_turns", None)),
            FixedMessage(role="user", content=self._question()),
        ]

    def _question(self) -> str:
        """The user's text, preceded by the memory's contents, without turns that the history contains."""
        context = self._context
        question = user_text(self._question_text)
        # If the context assembler returns no transcript, the memory is the only source of earlier turns.
        repeated_keys = getattr(context, "conversation_keys", ()) if context.transcript else ()
        memory_sections = [
            f"## {key}\n{_as_list(value)}"
            for key, value in context.memory_view.items()
            if value and key not in repeated_keys
        ]
        return "\n\n".join([*memory_sections, f"## question\n{question}"]) if memory_sections else question

    async def take_steering(self, answer: str | None = None) -> bool:
        """Append the messages that were sent to the run since the last time; returns whether there were any.

        `answer` is the answer of the model that they follow, if they arrived after it.
        """
        take_steering = getattr(self._context, "take_steering", None)
        texts = await take_steering() if take_steering is not None else ()
        if not texts:
            return False
        if answer and not is_blank(answer):
            self._add_to_turn(FixedMessage(role="assistant", content=answer))
        steered = FixedMessage(role="user", content="\n\n".join(texts))
        last = self._messages[-1]
        if last["role"] == "user":  # some models need alternating roles
            self._messages[-1] = FixedMessage(last, content=f"{last['content']}\n\n{steered['content']}")
            self._turn.append(steered)
        else:
            self._add_to_turn(steered)
        return True

    def _add_to_turn(self, *messages: FixedMessage) -> None:
        self._messages += messages
        self._turn += messages

    async def ask(self, *, step: int, **changed: Any) -> LLMResponse:
        """The model's reply, to a request with the messages that were sent to the run meanwhile.

        If the request exceeds the model's context, it is repeated with less history. `changed` are parameters
        of `LLMClient.generate` in place of those of the agent.
        """
        await self.take_steering()
        while True:
            try:
                return await self._generate(changed)
            except LLMResponseError as error:
                if not is_too_long(error) or not self._shorten_the_past():
                    raise
            await self._context.emit("pattern.past_shortened", step=step, messages=len(self._messages))

    def _shorten_the_past(self) -> bool:
        """Remove the tool calls of earlier turns; the next time, the older half of the history.

        Returns False if no history is left. The question and the messages after it are always kept.
        """
        messages = self._messages
        past = messages[self._past_at : self._question_at - 1]
        if not past:
            return False
        # First without tool calls. If there were none, the newer half of the turns.
        kept = [message for message in past if message["role"] != "tool" and "tool_calls" not in message]
        if len(kept) == len(past):
            questions = [at for at, message in enumerate(past) if message["role"] == "user"]
            middle = len(questions) // 2
            kept = past[questions[middle] :] if middle else []
        messages[self._past_at : self._question_at - 1] = kept
        self._question_at -= len(past) - len(kept)
        return True

    async def _generate(self, changed: dict[str, Any]) -> LLMResponse:
        options = self._context.llm_options
        arguments: dict[str, Any] = {
            "messages": list(self._messages),
            "model": getattr(options, "model", None),
            "temperature": getattr(options, "temperature", None),
            "max_tokens": getattr(options, "max_tokens", None),
        }
        if "tools" not in changed:  # the usual turn of a run, whose answer is the run's output
            arguments |= {"tools": tool_schemas(self._context.tools) or None, **self._output_format()}
        return await self._context.llm_client.generate(**(arguments | changed))

    def _output_format(self) -> dict[str, Any]:
        """The argument for the schema of the run's output, if the run has one."""
        form = getattr(self._context, "output_format", None)
        return {} if form is None else {"response_format": form}

    # --- tool calls --------------------------------------------------------------------------------------

    async def run_calls(self, response: LLMResponse, *, step: int) -> list[ToolCallOutcome]:
        """Run the tool calls of a reply, and append them and their results to the messages."""
        calls = usable_calls(response.tool_calls, self._ids, step)
        self._is_cut = response.finish_reason == FinishReason.LENGTH
        message = assistant_message(response, calls)
        self._unfinished, self._outcomes = (message, calls), {}
        outcomes = await self._run_in_order(calls)
        self._unfinished = None
        succeeded = [outcome for outcome in outcomes if outcome.error is None]
        self._context.tool_results.extend(
            {"tool_id": each.call.name, "result": each.result} for each in succeeded
        )
        self._add_to_turn(message, *(outcome.message() for outcome in outcomes))
        return outcomes

    async def _run_in_order(self, calls: Sequence[LLMToolCall]) -> list[ToolCallOutcome]:
        """Run the calls and return the outcomes in the same order.

        Consecutive calls run concurrently if their tools are `concurrency_safe`. If some may need an
        approval, they are asked about together.
        """
        if len(calls) > 1 and any(map(self._may_need_approval, calls)):
            together = [(self._run_call(call), self._is_concurrency_safe(call)) for call in calls]
            return await _run_concurrently(begin_together(together))
        outcomes: list[ToolCallOutcome] = []
        for safe, consecutive in groupby(calls, key=self._is_concurrency_safe):
            group = list(consecutive)
            if safe and len(group) > 1:
                outcomes += await _run_concurrently([self._run_call(call) for call in group])
            else:
                outcomes += [await self._run_call(call) for call in group]
        return outcomes

    def _is_concurrency_safe(self, call: LLMToolCall) -> bool:
        tool = self._context.tools.get(call.name)
        return tool is not None and tool.concurrency_safe

    def _may_need_approval(self, call: LLMToolCall) -> bool:
        return bool(getattr(self._context.tools.get(call.name), "may_need_approval", False))

    async def _run_call(self, call: LLMToolCall) -> ToolCallOutcome:
        """Run one call. Errors of the tool become its outcome; errors of the run are raised."""
        self._outcomes[call.id] = None
        outcome = self._outcomes[call.id] = await self._outcome_of(call)
        return outcome

    async def _outcome_of(self, call: LLMToolCall) -> ToolCallOutcome:
        try:
            return ToolCallOutcome(call, result=await self._invoke(call))
        except StepTooLarge as error:
            return ToolCallOutcome(call, error=error)
        except ExecutionError:  # an error of the run, not of the tool: for example a budget
            raise
        except OpenAgentsError as error:
            return ToolCallOutcome(call, error=error)

    async def _invoke(self, call: LLMToolCall) -> Any:
        tool = self._context.tools.get(call.name)
        if tool is None:
            raise await self._emit_failed(call, unknown_tool(call.name, sorted(self._context.tools)))
        if call.parse_error:
            problem = f"the call cannot be read: {call.parse_error}"
            hint = "call it again with a JSON object as its arguments"
            if self._is_cut:
                hint = "your reply was cut at its token limit; call it again with shorter arguments"
            raise await self._emit_failed(call, ToolValidationError(problem, call.name, hint=hint))
        return await tool.invoke(dict(call.arguments), self._context)

    async def _emit_failed(self, call: LLMToolCall, error: OpenAgentsError) -> OpenAgentsError:
        """Emit `tool.failed` for a call that reaches no tool, and return its error."""
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


def checked_answer(reply: LLMResponse, *, accept_truncated: bool = False, accept_empty: bool = False) -> str:
    """The text of a reply without tool calls, if it is a whole answer.

    Raises `LLMReplyTruncated`, `LLMReplyFiltered`, `LLMReplyRefused` or `LLMReplyEmpty`, and
    `LLMResponseError` for a reply that an error ended. With
    `accept_truncated`, a text that was cut by the token limit or by a filter is an answer. With
    `accept_empty`, no text is one. A reply without a finish reason, of a client that does not know it, is
    always one.
    """
    text, reason = reply.output_text, reply.finish_reason
    accepted = accept_truncated and not is_blank(text)
    match reason:
        case None:
            return text
        case FinishReason.LENGTH if not accepted:
            raise _truncated(reply)
        case FinishReason.CONTENT_FILTER if not accepted:
            raise LLMReplyFiltered("the provider's content filter cut the answer")
        case FinishReason.REFUSAL:
            raise LLMReplyRefused(f"the model refuses to answer: {text[:MAX_REFUSAL_CHARS]}".rstrip(": "))
        case FinishReason.ERROR:
            raise LLMResponseError(f"the reply ended with an error (finish reason: {reply.stop_reason})")
    if is_blank(text) and not accept_empty:
        raise LLMReplyEmpty(
            f"the model ended its reply without an answer (finish reason: {reply.stop_reason or reason})"
        )
    return text


def _truncated(reply: LLMResponse) -> LLMReplyTruncated:
    tokens = f" after {reply.usage.output_tokens:,} tokens" if reply.usage is not None else ""
    what = "the answer was cut" if not is_blank(reply.output_text) else "the model used up its tokens"
    return LLMReplyTruncated(
        f"{what}{tokens} (finish reason: {reply.stop_reason or reply.finish_reason})",
        hint="raise llm.max_tokens, or set accept_truncated in the pattern's config",
    )


def step_limit(context: RunContext, configured: int) -> int:
    """The largest number of steps of the run: the configured one, or the request's budget if it is lower."""
    budget = getattr(context.run_request, "budget", None)
    allowed: int | None = getattr(budget, "max_steps", None)
    return configured if allowed is None else min(configured, allowed)


async def more_steps(context: RunContext, limit: int) -> int:
    """The number of steps that the run may make now, after `limit` steps: somebody has extended its budget.

    Raises `MaxStepsExceeded`. With `on_breach: pause`, the run waits here.
    """
    exceeded = MaxStepsExceeded(f"Pattern exceeded max_steps ({limit})")
    ask = getattr(context, "more_steps", None)
    if ask is None:
        raise exceeded
    extended: int = await ask(limit, exceeded)
    return extended


class step_deadline:
    """End a step after `limit_ms` milliseconds with `StepTimeoutError`. Other TimeoutErrors are unchanged.

    If the runtime can retry the step later, it suspends the run here, and the pattern gets no error.
    """

    __slots__ = ("_context", "_deadline", "_error", "_limit_ms", "_loop", "_step", "_timer")

    def __init__(self, context: RunContext, step: int, limit_ms: int | None) -> None:
        self._context = context
        self._step = step
        self._limit_ms = limit_ms
        self._error: StepTimeoutError | None = None

    async def __aenter__(self) -> None:
        if self._limit_ms is None:
            return
        self._loop = asyncio.get_running_loop()
        # Not asyncio.wait_for: it would run the step in another task, which changes the place of its calls.
        self._deadline = asyncio.timeout(None)
        await self._deadline.__aenter__()
        self._timer = self._loop.call_later(self._limit_ms / 1000, self._on_timeout)

    def _on_timeout(self) -> None:
        self._error = StepTimeoutError(
            f"Pattern step timed out after {self._limit_ms}ms at step {self._step}", step_number=self._step
        )
        suspend_for_retry = getattr(self._context, "suspend_for_retry", None)
        if suspend_for_retry is None or not suspend_for_retry(self._error, f"step {self._step}"):
            self._deadline.reschedule(self._loop.time())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._limit_ms is None:
            return
        self._timer.cancel()
        try:
            await self._deadline.__aexit__(kind, error, trace)
        except TimeoutError as timeout:  # the deadline has cancelled the block
            error = timeout
        if self._error is not None and self._deadline.expired() and isinstance(error, TimeoutError):
            raise self._error from None


async def _run_concurrently(calls: Sequence[Coroutine[Any, Any, ToolCallOutcome]]) -> list[ToolCallOutcome]:
    """Run calls concurrently, started in order. If one raises, the others are cancelled and awaited first.

    A signal of the runtime (a BaseException that is neither an Exception nor a CancelledError) is raised
    rather than any other error.
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


def tool_schemas(tools: Mapping[str, RunTool]) -> list[dict[str, Any]]:
    """The tools under their ids, in a fixed order, because prompt caches and replay compare requests."""
    return [
        {"type": "function", "function": {**tool.describe(), "name": tool_id}}
        for tool_id, tool in sorted(tools.items())
    ]


def unknown_tool(name: str, known: list[str]) -> ToolNotFoundError:
    """The error for a tool that the run does not have, with a suggestion."""
    name = name[:MAX_NAME_CHARS]
    hint = did_you_mean(name, known, "the tools are")
    return ToolNotFoundError(f"there is no tool {name!r}", name, hint=hint)


def last_error(outcomes: Sequence[ToolCallOutcome]) -> OpenAgentsError:
    """The error of the last call that failed."""
    return next(outcome.error for outcome in reversed(outcomes) if outcome.error is not None)


def _as_list(value: Any) -> str:
    return "\n".join(f"- {_text(item)}" for item in value) if isinstance(value, list) else _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)
