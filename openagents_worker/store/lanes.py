"""Lanes. The only place that sends the commands of many runs together: one round trip for all that wait.

A client of redis-py takes a connection of its own for every command, which costs a busy process more than all
else it does. Here the commands that come up in one turn of the loop travel as one pipeline; what comes up
while it is on its way waits for the next. Two lanes, so that a connection that does not answer holds up only
what is on it.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import redis
from redis import exceptions
from redis.utils import HIREDIS_AVAILABLE

if HIREDIS_AVAILABLE:
    from hiredis import pack_command

__all__ = ["Lanes"]

LANES = 2
MOST_COMMANDS = 128  # of one pipeline: the first answer is not to wait for a thousand others
HELD_S = 1.0  # then the pool may see that another Redis is the master now, however much there is to carry
_FOR = () if tuple(map(int, redis.__version__.split(".")[:2])) >= (5, 3) else ("EVALSHA",)
"""What a pool wants to hear before it gives a connection; from redis-py 5.3 on, nothing."""
SHUT = "the lane was closed before the answer came"

Command = tuple[str | int, ...]


class _Asked(NamedTuple):
    command: Command
    answer: asyncio.Future[Any]


class Lanes:
    """Pipelines over the connections of a redis-py pool. One per event loop."""

    def __init__(self, pool: Any, *, answer_timeout_s: float | None, lanes: int = LANES) -> None:
        self._pool = pool
        self._answer_timeout_s = answer_timeout_s
        self._lanes = lanes
        self._waiting: deque[_Asked] = deque()
        self._carrying: set[asyncio.Task[None]] = set()
        self._called = False

    async def ask(self, *command: str | int) -> Any:
        """The answer to one command. Raises what redis-py raises for it.

        Whoever is cancelled does not get the answer; the command may be carried out all the same.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Asked(command, answer))
        self._call()
        return await answer

    async def close(self) -> None:
        """Give up what is on its way, and what waits."""
        for task in list(self._carrying):
            task.cancel()
            await asyncio.wait([task])
        _fail(self._waiting, exceptions.ConnectionError(SHUT))

    def _call(self) -> None:
        if self._waiting and not self._called and len(self._carrying) < self._lanes:
            self._called = True
            asyncio.get_running_loop().call_soon(self._go)

    def _go(self) -> None:
        """Set off with what waits, in the next turn of the loop: by then others may have come."""
        self._called = False
        if self._waiting and len(self._carrying) < self._lanes:
            self._carrying.add(asyncio.create_task(self._carry(), name="redis lane"))

    async def _carry(self) -> None:
        """Carry what waits, and what came meanwhile, until nothing waits any more."""
        asked: deque[_Asked] = deque()
        try:
            while self._waiting:
                connection = await self._pool.get_connection(*_FOR)
                try:
                    give_back_s = time.monotonic() + HELD_S
                    with _limited_by_us(connection):
                        while self._waiting and time.monotonic() < give_back_s:
                            asked = self._next()
                            await self._carry_out(connection, asked)
                finally:
                    if asked:  # its answers would be taken for those of the next
                        await connection.disconnect(nowait=True)
                    await self._pool.release(connection)
        except BaseException as error:
            lost = error if isinstance(error, Exception) else exceptions.ConnectionError(SHUT)
            _fail(asked or self._waiting, lost)
            if not isinstance(error, Exception):
                raise
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._carrying.discard(task)
            self._call()  # what came while this one ended

    def _next(self) -> deque[_Asked]:
        asked: deque[_Asked] = deque()
        while self._waiting and len(asked) < MOST_COMMANDS:
            one = self._waiting.popleft()
            if not one.answer.done():  # else nobody waits for it any more
                asked.append(one)
        return asked

    async def _carry_out(self, connection: Any, asked: deque[_Asked]) -> None:
        """Send the commands, hand out the answers in their order; those left in `asked` have got none."""
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                await connection.send_packed_command(_packed(connection, asked))
                while asked:
                    try:
                        answer, refused = await connection.read_response(), None
                    except exceptions.ResponseError as error:
                        answer, refused = None, error
                    _tell(asked.popleft().answer, answer, refused)
        except TimeoutError as error:
            raise exceptions.TimeoutError("Timeout reading from socket") from error


@contextmanager
def _limited_by_us(connection: Any) -> Iterator[None]:
    """One time limit for all answers of a pipeline; one for each costs more than to read it."""
    limit_s, connection.socket_timeout = connection.socket_timeout, None
    try:
        yield
    finally:
        connection.socket_timeout = limit_s


def _packed(connection: Any, asked: Sequence[_Asked]) -> list[bytes]:
    """The commands as they go over the wire; hiredis writes them in a tenth of the time."""
    if not HIREDIS_AVAILABLE:
        return list(connection.pack_commands([one.command for one in asked]))
    packed = [pack_command(one.command) for one in asked]  # type: ignore[arg-type]  # its stub means any length
    return [b"".join(packed)]


def _tell(answer: asyncio.Future[Any], value: Any, refused: Exception | None) -> None:
    if answer.done():  # whoever asked has been cancelled
        return
    if refused is None:
        answer.set_result(value)
    else:
        answer.set_exception(refused)


def _fail(asked: deque[_Asked], error: Exception) -> None:
    while asked:
        # A copy each: raised in many tasks, one exception would collect all their traces.
        _tell(asked.popleft().answer, None, copy.copy(error))
