"""A proxy for Redis that parses commands: the only place that counts them and breaks connections between
them.

Every worker has its own port, so the sender of each command is known.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

from openagents_worker.store import scripts
from tests.support.proxy import Line, Lines

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
# Commands that do not belong to a run: the heartbeat, the rescue loop, and the start of a connection.
NOT_IN_A_RUN = {
    "register", "renew", "retire", "end_lease", "look", "alarm", "reclaim", "wake", "first_due", "resend",
    "resend_unread",
    "auth", "client", "eval", "hello", "info", "ping", "script", "select", "subscribe", "time", "unsubscribe",
    "zrange",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a run; `number` counts from 1 since the last call of `Proxy.count`."""

    number: int
    name: str
    worker: str


Verdict = Callable[[Command], Awaitable[bool | str]]
"""Called for a command. True: the command or its reply is dropped and the connection is reset. A text (only
before a command): the error reply; Redis does not get the command."""


async def _let_pass(_: Command) -> bool:
    return False


class Proxy(Lines):
    """Connections of workers to one Redis.

    `before` is called when a command has arrived, `after` when Redis has replied to it.
    """

    resets = True

    def __init__(self, redis_url: str) -> None:
        super().__init__(redis_url)
        self.before: Verdict = _let_pass
        self.after: Verdict = _let_pass
        self.seen: list[Command] = []
        self.other_commands: dict[str, int] = {}
        """The number of commands that do not belong to a run, by name."""
        self._pending: WeakKeyDictionary[asyncio.StreamReader, deque[Command | None]] = WeakKeyDictionary()

    def url_of(self, worker: str) -> str:
        """Open a new port for this worker; returns its URL."""
        return self.listen(partial(self._commands, worker), self._answers)

    def count(self, *, before: Verdict = _let_pass, after: Verdict = _let_pass) -> None:
        """Count from 1 again, with these verdicts."""
        self.seen, self.other_commands = [], {}
        self.before, self.after = before, after

    # --- one connection ----------------------------------------------------------------------------------

    async def _commands(self, worker: str, line: Line) -> None:
        pending = self._pending.setdefault(line.from_redis, deque())
        while True:
            raw, words = await _command(line.from_client)
            command = self._record_command(worker, words)
            verdict = command is not None and await self.before(command)
            if verdict is True:
                return
            if verdict:
                raw = _error_command(str(verdict))
            pending.append(command)
            line.to_redis.write(raw)
            await line.to_redis.drain()

    async def _answers(self, line: Line) -> None:
        pending = self._pending.setdefault(line.from_redis, deque())
        while True:
            raw = await value_of(line.from_redis)
            command = pending.popleft() if pending else None  # a published message is not a reply
            if command is not None and await self.after(command):
                return
            line.to_client.write(raw)
            await line.to_client.drain()

    def _record_command(self, worker: str, words: list[bytes]) -> Command | None:
        name = words[0].decode().lower()
        if name == "evalsha":
            name = SCRIPTS.get(words[1], "an unknown script")
        if name in NOT_IN_A_RUN:
            self.other_commands[name] = self.other_commands.get(name, 0) + 1
            return None
        self.seen.append(Command(len(self.seen) + 1, name, worker))
        return self.seen[-1]


def _error_command(error: str) -> bytes:
    """A command to which Redis replies with this error, so that it stays in order with other replies."""
    words = ["EVAL", "return redis.error_reply(ARGV[1])", "0", error]
    return b"".join(
        [b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(word), word.encode()) for word in words)]
    )


# --- RESP ------------------------------------------------------------------------------------------------


async def _command(reader: asyncio.StreamReader) -> tuple[bytes, list[bytes]]:
    """The bytes of a command, and its arguments."""
    head = await reader.readuntil(b"\r\n")
    raw, words = [head], []
    for _ in range(int(head[1:-2])):
        raw.append(await reader.readuntil(b"\r\n"))
        raw.append(await reader.readexactly(int(raw[-1][1:-2]) + 2))
        words.append(raw[-1][:-2])
    return b"".join(raw), words


async def value_of(reader: asyncio.StreamReader) -> bytes:
    """The bytes of one reply in RESP 2 or 3."""
    head = await reader.readuntil(b"\r\n")
    kind, count = head[:1], head[1:-2]
    if kind in b"$=!":
        return head if int(count) < 0 else head + await reader.readexactly(int(count) + 2)
    items = {b"*": 1, b"~": 1, b">": 1, b"%": 2}.get(kind, 0) * max(int(count), 0) if kind in b"*~>%" else 0
    return b"".join([head, *[await value_of(reader) for _ in range(items)]])
