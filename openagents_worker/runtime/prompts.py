"""Prompt digests: the only place that computes what identifies a model call, hashing only new messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from openagents_worker.jsontext import canonical_json, dumps, loads
from openagents_worker.llm.base import FixedMessage

__all__ = ["PromptDigests"]

OPTIONS = ("model", "temperature", "max_tokens", "tool_choice", "response_format")
IGNORED_FIELDS = frozenset({"cache_control", "metadata", "provider_fields"})
"""Fields of a message that do not identify its prompt. `provider_fields` follow from recorded replies, and
earlier versions, which may replay the run, do not send them."""
INSTRUCTIONS = frozenset({"system", "developer"})
"""Roles of instructions by the deployment. All other messages are the conversation."""
DIGEST_BYTES = 12
KEPT_CONVERSATIONS = 4  # per branch: for example planner, executor, judge, and one more


class PromptDigests:
    """Computes the digest of each prompt, and of its core: the prompt without instructions.

    A known message is not hashed again if it still equals the kept copy.
    """

    def __init__(self) -> None:
        self._tools: Any = None
        self._tools_digest = ""

    def digests_of(self, request: Mapping[str, Any], known: dict[str, Any], scope: str) -> tuple[str, str]:
        """The digests of a prompt and of its core. `known` keeps the hash state, by scope.

        Raises TypeError or ValueError for a prompt that is not JSON.
        """
        messages: list[Mapping[str, Any]] = request["messages"]
        conversations: list[_HashedConversation] = known.setdefault(scope, [])
        for index, conversation in enumerate(conversations):
            if conversation.is_continued_by(messages):
                conversations.insert(0, conversations.pop(index))
                break
        else:
            conversations.insert(0, _HashedConversation())
            del conversations[KEPT_CONVERSATIONS:]
        conversations[0].add_new(messages)
        options = canonical_json([request.get(name) for name in OPTIONS]) + self._digest_of_tools(request)
        return conversations[0].digests(options.encode())

    def _digest_of_tools(self, request: Mapping[str, Any]) -> str:
        tools = request.get("tools")
        if not tools:
            return ""
        if tools != self._tools:
            text = canonical_json(tools)
            self._tools, self._tools_digest = loads(text), _digest(text)
        return self._tools_digest


class _HashedConversation:
    """A prompt that grows. Messages are compared with kept copies, so that changes in place are detected."""

    def __init__(self) -> None:
        self._known: list[Any] = []
        self._call_ids: dict[Any, str] = {}
        self._all = blake2b(digest_size=DIGEST_BYTES)
        self._core = blake2b(digest_size=DIGEST_BYTES)

    def is_continued_by(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        return messages[: len(self._known)] == self._known

    def add_new(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Hash the messages that are new."""
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
        """The message with tool call ids replaced by their order, because some providers generate new ids."""
        plain = {key: value for key, value in message.items() if key not in IGNORED_FIELDS}
        if calls := plain.get("tool_calls"):
            plain["tool_calls"] = [self._canonical_call(call) for call in calls]
        if "tool_call_id" in plain:
            plain["tool_call_id"] = self._ordinal_of(plain["tool_call_id"])
        return plain

    def _canonical_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        plain = {key: value for key, value in call.items() if key != "provider_fields"}
        return {**plain, "id": self._ordinal_of(call.get("id"))}

    def _ordinal_of(self, call_id: Any) -> str:
        return self._call_ids.setdefault(call_id, f"#{len(self._call_ids)}")


def _kept(message: Mapping[str, Any]) -> Any:
    """A copy of a message for later comparison; the message itself if it is immutable."""
    if type(message) is FixedMessage:
        return message
    if any(isinstance(value, dict | list) for value in message.values()):
        return loads(dumps(message))
    return dict(message)


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).hexdigest()
