"""One turn with a model: the only place that sends the requests of the patterns and builds their messages.

All patterns that use a model share this code.

Each request begins with the messages of the previous request, also across the turns of a session, because
providers cache that prefix. So the system message contains only parts of the agent's definition. The contents
of the memory, which may change in every turn, precede the question.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from openagents_worker.errors import LLMResponseError
from openagents_worker.llm.base import FixedMessage, LLMResponse
from openagents_worker.llm.conversation import UniqueCallIds, is_blank, usable_calls, user_text
from openagents_worker.llm.failures import is_too_long
from openagents_worker.llm.transcript import answer_fields, model_messages
from openagents_worker.patterns.base import RunContext, RunTool
from openagents_worker.patterns.tool_calls import ReplyCalls, ToolCallOutcome, shown_text

__all__ = ["Conversation", "tool_schemas"]

Messages = list[dict[str, Any]]


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
        self._turn: Messages = []
        self._running: ReplyCalls | None = None

    @property
    def turn_messages(self) -> Messages:
        """What the session's transcript stores of the turn: the tool calls after the question, their results,
        the messages that were sent to the run meanwhile with the answers that they followed, and the answer
        if it has opaque fields."""
        return [*self._turn, *(message for message in self._messages[-1:] if "provider_fields" in message)]

    @property
    def turn_so_far(self) -> Messages:
        """The same while calls are running: each of these has a result that says that it was interrupted."""
        return list(self._turn) if self._running is None else [*self._turn, *self._running.messages]

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

    async def take_steering(self, answer: str | None = None, *, new: bool = True) -> bool:
        """Append the messages that were sent to the run since the last time; returns whether there were any.

        `answer` is the answer of the model that they follow, if they arrived after it. Without `new`, only
        those that an earlier attempt has taken here.
        """
        take_steering = getattr(self._context, "take_steering", None)
        texts = await take_steering(new=new) if take_steering is not None else ()
        if not texts:
            return False
        if answer and not is_blank(answer):
            self._add_to_turn(FixedMessage(role="assistant", content=answer))
        steered = FixedMessage(role="user", content="\n\n".join(texts))
        last = self._messages[-1]
        if last["role"] == "user":  # some models need alternating roles
            self._messages[-1] = FixedMessage(last, content=_with_text(last["content"], steered["content"]))
            self._turn.append(steered)
        else:
            self._add_to_turn(steered)
        return True

    def _add_to_turn(self, *messages: FixedMessage) -> None:
        self._messages += messages
        self._turn += messages

    async def ask(self, *, step: int, takes_steering: bool = True, **changed: Any) -> LLMResponse:
        """The model's reply, to a request with the messages that were sent to the run meanwhile.

        Without `takes_steering`, these wait for another request. If the request exceeds the model's context,
        it is repeated with less history. `changed` are parameters of `LLMClient.generate` in place of those
        of the agent.
        """
        await self.take_steering(new=takes_steering)
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
        calls = ReplyCalls(self._context, response, usable_calls(response.tool_calls, self._ids, step))
        self._running = calls
        outcomes = await calls.run()
        self._running = None
        succeeded = [outcome for outcome in outcomes if outcome.error is None]
        self._context.tool_results.extend(
            {"tool_id": each.call.name, "result": each.result} for each in succeeded
        )
        self._add_to_turn(calls.message, *(outcome.message() for outcome in outcomes))
        return outcomes


def tool_schemas(tools: Mapping[str, RunTool]) -> list[dict[str, Any]]:
    """The tools under their ids, in a fixed order, because prompt caches and replay compare requests."""
    return [
        {"type": "function", "function": {**tool.describe(), "name": tool_id}}
        for tool_id, tool in sorted(tools.items())
    ]


def _with_text(content: Any, text: str) -> Any:
    """The content of a message with one more paragraph; of a list of blocks, with one more block."""
    if isinstance(content, list):
        return [*content, {"type": "text", "text": text}]
    return f"{content}\n\n{text}"


def _as_list(value: Any) -> str:
    return (
        "\n".join(f"- {shown_text(item)}" for item in value) if isinstance(value, list) else shown_text(value)
    )
