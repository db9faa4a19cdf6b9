"""Memory by digest: the only place that remembers something about many large JSON values in little room."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Generic, TypeVar

from openagents_worker.jsontext import dumps

__all__ = ["MAX_REMEMBERED", "DigestMemory"]

MAX_REMEMBERED = 1_000
"""Contents that have a value."""

Value = TypeVar("Value")


class DigestMemory(Generic[Value]):
    """A value for each of the `MAX_REMEMBERED` newest contents. A content is kept as a digest of 16 bytes.

    >>> memory = DigestMemory[str]()
    >>> memory.put({"type": "object"}, "refused")
    >>> memory.get({"type": "object"}), memory.get([]), bool(memory)
    ('refused', None, True)
    """

    def __init__(self) -> None:
        self._values: dict[bytes, Value] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def get(self, content: Any) -> Value | None:
        """The value of a content; None if there is none, or if it was forgotten."""
        return self._values.get(_digest(content)) if self._values else None

    def put(self, content: Any, value: Value) -> None:
        """Remember the value. The content counts as the newest one from now on."""
        digest = _digest(content)
        self._values.pop(digest, None)
        self._values[digest] = value
        if len(self._values) > MAX_REMEMBERED:
            del self._values[next(iter(self._values))]


def _digest(content: Any) -> bytes:
    return blake2b(dumps(content).encode("utf-8", "replace"), digest_size=16).digest()
