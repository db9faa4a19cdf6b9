"""Digests of prompts: what a call of a model asks, at a cost that depends on what is new in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from openagents_worker.jsontext import canonical_json, dumps, loads
from openagents_worker.llm.base import FixedMessage

__all__ = ["PromptDigests"]

OPTIONS = ("model", "temperature", "max_tokens", "tool_choice", "response_format")
BESIDE_THE_PROMPT = frozenset({"cache_control", "metadata"})
"""Parts of a message that do not change the answer."""
INSTRUCTIONS = frozenset({"system", "developer"})
"""Roles of the messages that a deployment writes; the others are the conversation itself."""
DIGEST_BYTES = 12
KEPT_CONVERSATIONS = 4  # of one branch: a planner's, an executor's, a judge's, and one more


class PromptDigests:
    """The digest of each prompt, and of its core: the same without the messages that only instruct.

    A message that was seen before is not hashed again, as long as it equals the copy that was kept of it.
    """

    def __init__(self) -> None:
        self._tools: Any = None
        self._tools_digest = ""

    def of(self, given: Mapping[str, Any], known: dict[str, Any], scope: str) -> tuple[str, str]:
        """Both digests; `known` keeps what was hashed, by scope.

        Raises TypeError or ValueError for a prompt that is not JSON.
        """
        messages: list[Mapping[str, Any]] = given["messages"]
        conversations: list[_Conversation] = known.setdefault(scope, [])
        for index, conversation in enumerate(conversations):
            if conversation.is_continued_by(messages):
                conversations.insert(0, conversations.pop(index))
                break
        else:
            conversations.insert(0, _Conversation())
            del conversations[KEPT_CONVERSATIONS:]
        conversations[0].go_on(messages)
        options = canonical_json([given.get(name) for name in OPTIONS]) + self._digest_of_tools(given)
        return conversations[0].digests(options.encode())

    def _digest_of_tools(self, given: Mapping[str, Any]) -> str:
        tools = given.get("tools")
        if not tools:
            return ""
        if tools != self._tools:
            text = canonical_json(tools)
            self._tools, self._tools_digest = loads(text), _digest(text)
        return self._tools_digest


class _Conversation:
    """A prompt that grows. What it holds is compared, so that a message changed in place is seen."""

    def __init__(self) -> None:
        self._known: list[Any] = []
        self._call_ids: dict[Any, str] = {}
        self._all = blake2b(digest_size=DIGEST_BYTES)
        self._core = blake2b(digest_size=DIGEST_BYTES)

    def is_continued_by(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        return messages[: len(self._known)] == self._known

    def go_on(self, messages: Sequence[Mapping[str, Any]]) -> None:
        for message in messages[len(self._known) :]:
            text = canonical_json(self._canonical(message)).encode(errors="surrogatepass")
            digest = blake2b(text, digest_size=DIGEST_BYTES).digest()
            self._all.update(digest)
            if message.get("role") not in INSTRUCTIONS:
                self._core.update(digest)
            self._known.append(_kept(message))

    def digests(self, options: bytes) -> tuple[str, str]:
        whole, core = self._all.copy(), self._core.copy()
        whole.update(options)
        core.update(options)
        return whole.hexdigest(), core.hexdigest()

    def _canonical(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The ids of tool calls by their order: a provider that sends none gets other ones every time."""
        plain = {key: value for key, value in message.items() if key not in BESIDE_THE_PROMPT}
        if calls := plain.get("tool_calls"):
            plain["tool_calls"] = [{**call, "id": self._order(call.get("id"))} for call in calls]
        if "tool_call_id" in plain:
            plain["tool_call_id"] = self._order(plain["tool_call_id"])
        return plain

    def _order(self, call_id: Any) -> str:
        return self._call_ids.setdefault(call_id, f"#{len(self._call_ids)}")


def _kept(message: Mapping[str, Any]) -> Any:
    """What a message is compared with later: itself, where nobody changes it, else a copy."""
    if type(message) is FixedMessage:
        return message
    if any(isinstance(value, dict | list) for value in message.values()):
        return loads(dumps(message))
    return dict(message)


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).hexdigest()
