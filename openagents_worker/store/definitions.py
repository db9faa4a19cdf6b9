"""Definitions of agents: the only place that reads and writes them in Redis.

A definition is stored once, under the hash of its content. A run knows its definition under another hash,
which also depends on the values of variables. A small key leads from that hash to the content.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis import exceptions

from openagents_worker.store.client import Reader
from openagents_worker.store.redis_errors import Failure, failure_of

__all__ = ["DefinitionStore", "NotReadable"]

T = TypeVar("T")

DAY_MS = 24 * 60 * 60 * 1000
LONGEST_RUN_MS = 2 * 366 * DAY_MS
"""How long a run may be under way, such as one that is parked for a year, until its definition is gone."""
MAX_STORED_BYTES = 2 * 1024 * 1024  # of a text that may be encrypted; no more is read
_is_hash = re.compile(r"[0-9a-f]{64}").fullmatch


class NotReadable(Exception):
    """Redis refuses to read or write a definition, or the text is too large. The message says why."""


class DefinitionStore:
    """The definitions in one Redis. `run_ttl_s` is how long a run is kept after its end."""

    def __init__(self, reader: Reader, *, run_ttl_s: int) -> None:
        self._reader = reader
        self._ttl_ms = LONGEST_RUN_MS + run_ttl_s * 1000

    async def content_hash(self, definition_hash: str) -> str | None:
        """The content hash of the definition that a run knows under this hash; None if it is not stored.

        Raises `NotReadable`, and the errors of the reader.
        """
        if not _is_hash(definition_hash):
            raise NotReadable("the run names it by a text that is not a hash")
        found = await self._read("definition_of", definition_hash)
        if found is not None and not _is_hash(found):
            raise NotReadable("the key that leads to it does not hold a hash")
        return found

    async def text(self, content_hash: str) -> str | None:
        """The text of a definition, None if it is not stored. Raises as `content_hash` does."""
        return await self._read("definition", content_hash)

    async def write(self, content_hash: str, text: str) -> None:
        """Store the text of a definition, in place of whatever is there. Raises as `content_hash` does."""
        key, encoded = self._reader.keys("definition", content_hash), self._reader.codec.encode(text)
        await self._ask(lambda r: r.set(key, encoded, px=self._ttl_ms))

    async def link(self, definition_hash: str, content_hash: str) -> None:
        """Store which content a run means with `definition_hash`. Raises as `content_hash` does."""
        key = self._reader.keys("definition_of", definition_hash)
        await self._ask(lambda r: r.set(key, content_hash, px=self._ttl_ms))

    async def renew(self, content_hash: str) -> None:
        """Let a stored definition live as long as a new one. Raises as `content_hash` does."""
        key = self._reader.keys("definition", content_hash)
        await self._ask(lambda r: r.pexpire(key, self._ttl_ms))

    async def _read(self, kind: str, id_: str) -> str | None:
        key = self._reader.keys(kind, id_)
        text: str = await self._ask(lambda r: r.getrange(key, 0, MAX_STORED_BYTES))
        if len(text.encode("utf-8", "replace")) > MAX_STORED_BYTES:
            raise NotReadable(f"it has more than {MAX_STORED_BYTES:,} bytes")
        return self._reader.codec.decode(text) or None

    async def _ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """Ask Redis. What it would refuse again must not stop the run, which can go on without."""

        async def answer(client: Any) -> T | exceptions.ResponseError:
            try:
                return await question(client)
            except exceptions.ResponseError as error:
                if failure_of(error) is not Failure.FINAL:
                    raise
                return error

        found = await self._reader.ask(answer)
        if isinstance(found, exceptions.ResponseError):
            raise NotReadable(f"Redis refuses it: {str(found)[:200]}") from found
        return found
