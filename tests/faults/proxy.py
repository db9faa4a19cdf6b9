"""A line to Redis that understands what is said: the only place that counts commands and breaks in between.

Every worker has a line of its own, so a command says which process sent it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

from openagents_worker.store import scripts
from tests.proxy import Line, Lines

__all__ = ["Command", "Proxy", "Verdict", "value_of"]

SCRIPTS = {
    sha.encode(): name
    for name in scripts.__all__
    if name[0].islower()
    for script in [getattr(scripts, name)().script]
    for sha in (
        script.sha,
        script.checking()[0],
        script.guarded[0],
    )  # the first run of a script in a process checks its rights
}
# What a worker asks whatever runs it has: its own beat, the rescue of others, and how a connection begins.
NOT_OF_A_RUN = {
    "register", "renew", "retire", "end_lease", "look", "alarm", "reclaim", "wake", "resend", "resend_unread",
    "auth", "client", "eval", "hello", "info", "ping", "script", "select", "subscribe", "time", "unsubscribe",
    "zrange",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a run; `number` counts from 1 since the proxy was told to count."""

    number: int
    name: str
    worker: str


Verdict = Callable[[Command], Awaitable[bool | str]]
"""Asked at a command; True: the command, or its answer, is lost and the connection is reset. A text, before
a command, is the error that it is answered with; Redis does not see it."""


async def _pass(_: Command) -> bool:
    return False


class Proxy(Lines):
    """Lines from workers to one Redis.

    `before` is asked when a command has arrived here, `after` when Redis has answered it.
    """

    resets = True

    def __init__(self, redis_url: str) -> None:
        super().__init__(redis_url)
        self.before: Verdict = _pass
        self.after: Verdict = _pass
        self.seen: list[Command] = []
        self.left_out: dict[str, int] = {}
        """Commands that are not of a run, by name."""
        self._asked: WeakKeyDictionary[asyncio.StreamReader, deque[Command | None]] = WeakKeyDictionary()

    def url_of(self, worker: str) -> str:
        """A new port for this worker."""
        return self.listen(partial(self._commands, worker), self._answers)

    def count(self, *, before: Verdict = _pass, after: Verdict = _pass) -> None:
        """Count from 1 again, and ask these."""
        self.seen, self.left_out = [], {}
        self.before, self.after = before, after

    # --- one connection ----------------------------------------------------------------------------------

    async def _commands(self, worker: str, line: Line) -> None:
        asked = self._asked.setdefault(line.from_redis, deque())
        while True:
            raw, words = await _command(line.from_client)
            command = self._counted(worker, words)
            verdict = command is not None and await self.before(command)
            if verdict is True:
                return
            if verdict:
                raw = _refusal(str(verdict))
            asked.append(command)
            line.to_redis.write(raw)
            await line.to_redis.drain()

    async def _answers(self, line: Line) -> None:
        asked = self._asked.setdefault(line.from_redis, deque())
        while True:
            raw = await value_of(line.from_redis)
            command = asked.popleft() if asked else None  # a published message answers nothing
            if command is not None and await self.after(command):
                return
            line.to_client.write(raw)
            await line.to_client.drain()

    def _counted(self, worker: str, words: list[bytes]) -> Command | None:
        name = words[0].decode().lower()
        if name == "evalsha":
            name = SCRIPTS.get(words[1], "an unknown script")
        if name in NOT_OF_A_RUN:
            self.left_out[name] = self.left_out.get(name, 0) + 1
            return None
        self.seen.append(Command(len(self.seen) + 1, name, worker))
        return self.seen[-1]


def _refusal(error: str) -> bytes:
    """A command that Redis answers with this error: so it comes at its place among the other answers."""
    words = ["EVAL", "return redis.error_reply(ARGV[1])", "0", error]
    return b"".join(
        [b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(word), word.encode()) for word in words)]
    )


# --- RESP ------------------------------------------------------------------------------------------------


async def _command(reader: asyncio.StreamReader) -> tuple[bytes, list[bytes]]:
    """A command as it is on the wire, and its words."""
    head = await reader.readuntil(b"\r\n")
    raw, words = [head], []
    for _ in range(int(head[1:-2])):
        raw.append(await reader.readuntil(b"\r\n"))
        raw.append(await reader.readexactly(int(raw[-1][1:-2]) + 2))
        words.append(raw[-1][:-2])
    return b"".join(raw), words


async def value_of(reader: asyncio.StreamReader) -> bytes:
    """One answer of RESP 2 or 3, as it is on the wire."""
    head = await reader.readuntil(b"\r\n")
    kind, count = head[:1], head[1:-2]
    if kind in b"$=!":
        return head if int(count) < 0 else head + await reader.readexactly(int(count) + 2)
    items = {b"*": 1, b"~": 1, b">": 1, b"%": 2}.get(kind, 0) * max(int(count), 0) if kind in b"*~>%" else 0
    return b"".join([head, *[await value_of(reader) for _ in range(items)]])
