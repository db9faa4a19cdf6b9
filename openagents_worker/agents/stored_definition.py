"""Stored definitions: the only place that writes the source of an agent as a text for Redis, and reads it."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from openagents_worker.agents.sources import AgentSource
from openagents_worker.agents.trust import signature_of
from openagents_worker.jsontext import check, dumps, loads

__all__ = ["MAX_BYTES", "StoredDefinition"]

MAX_BYTES = 1024 * 1024
"""A definition has a few KB. A longer one is neither stored nor read."""
VERSION = 1


@dataclass(frozen=True, slots=True)
class StoredDefinition:
    """The source of an agent, and the signature of the worker that has stored it; '' without a key."""

    source: AgentSource
    signature: str = ""

    @classmethod
    def signed(cls, source: AgentSource, key: str) -> StoredDefinition:
        return cls(source, signature_of(source, key) if key else "")

    def is_signed_with(self, key: str) -> bool:
        """Whether a worker with this key has signed it. False for an empty key."""
        return bool(key) and hmac.compare_digest(
            signature_of(self.source, key).encode(), self.signature.encode()
        )

    def to_json(self) -> str:
        text = {"v": VERSION, "in_code": self.source.in_code, "agent": self.source.data}
        return dumps({**text, "signature": self.signature} if self.signature else text)

    @classmethod
    def of(cls, text: str, content_hash: str) -> StoredDefinition:
        """Read the text of `to_json`. Raises ValueError that says why it cannot be used."""
        if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        value = loads(text)
        if not isinstance(value, dict) or not isinstance(value.get("agent"), dict):
            raise ValueError("it is not an object with a definition")
        if value.get("v") != VERSION:
            raise ValueError("another version of this library has written it")
        check(value)
        source = AgentSource(value["agent"], value.get("in_code") is True)
        if source.content_hash != content_hash:
            raise ValueError("its content does not have the hash under which it is stored")
        signature = value.get("signature", "")
        return cls(source, signature if isinstance(signature, str) else "")
