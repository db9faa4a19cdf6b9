"""The scripted model: replies of an agent's model, written in Python in a test."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from openagents_worker.agents import AgentDefinition
from openagents_worker.errors import LLMResponseError
from openagents_worker.llm.base import Message, current_call
from openagents_worker.llm.script import ReplyScript, ScriptedFault, ScriptedReply, read_entry
from openagents_worker.llm.scripted import FAULTS, ScriptedClient

__all__ = ["ModelCall", "ScriptedModel"]

Reply = str | Mapping[str, Any]
"""A text, or an entry of a script: `{"text"}`, `{"tool_calls"}` or `{"error"}`."""

Function = TypeVar("Function", bound=Callable[..., Reply | Awaitable[Reply]])


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One call of the model. `n` counts the run's model calls from 0 and is the same on every attempt."""

    agent_id: str
    run_id: str
    n: int
    failed_tries: int
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]

    @property
    def said(self) -> str:
        """The content of the last message: the user's text, or a tool's result."""
        return str(self.messages[-1].get("content") or "") if self.messages else ""


class ScriptedModel:
    """A model whose replies a test defines, as a function of the call or as a list.

    >>> model = ScriptedModel()
    >>> @model
    ... def reply(call):
    ...     return f"You said: {call.said}"

    The function may be async. It runs on the worker's event loop, in another thread than the test. `calls`
    lists the calls so far. An exception of the function fails the run, and then the test.
    """

    def __init__(self) -> None:
        self.calls: list[ModelCall] = []
        self.errors: list[Exception] = []
        self._function: Callable[[ModelCall], Any] | None = None

    def __call__(self, function: Function) -> Function:
        """Use this function for all further replies. Usable as a decorator."""
        self._function = function
        return function

    def will_say(self, *replies: Reply) -> None:
        """Answer the n-th model call of every run with the n-th of these replies.

        An entry `{"error": "rate_limit" | "connection" | "response"}` is a fault of the call whose reply
        follows it.
        """
        entries = [{"text": reply} if isinstance(reply, str) else reply for reply in replies]
        script = ReplyScript(entries, faults=FAULTS)
        self._function = lambda call: script.entry(call.n, call.failed_tries)

    def client(self, definition: AgentDefinition) -> ScriptedClient:
        """A model client for this agent, for use by a worker."""
        return _ScriptedModelClient(self, definition)

    async def entry(self, call: ModelCall) -> ScriptedReply | ScriptedFault | None:
        """The reply or fault for a call. Raises `LLMResponseError` if the test's function fails."""
        self.calls.append(call)
        try:
            if self._function is None:
                raise LLMResponseError(
                    "the scripted model has no replies",
                    hint="decorate a function with @scripted_model, or call scripted_model.will_say(…)",
                )
            reply = self._function(call)
            if inspect.isawaitable(reply):
                reply = await reply
            if reply is None or isinstance(reply, ScriptedReply | ScriptedFault):
                return reply
            entry = {"text": reply} if isinstance(reply, str) else reply
            return read_entry(entry, faults=FAULTS, where=f"the reply to call {call.n}")
        except Exception as error:
            self.errors.append(error)
            raise LLMResponseError(f"the scripted model failed: {type(error).__name__}: {error}") from error


class _ScriptedModelClient(ScriptedClient):
    def __init__(self, model: ScriptedModel, definition: AgentDefinition) -> None:
        super().__init__(definition.llm)
        self._model = model
        self._agent_id = definition.id

    async def _entry(
        self, ordinal: int, failed_tries: int, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> ScriptedReply | ScriptedFault | None:
        info = current_call.get()
        run_id = info.run_id if info is not None else ""
        call = ModelCall(self._agent_id, run_id, ordinal, failed_tries, tuple(messages), tuple(tools))
        return await self._model.entry(call)
