"""Lanes. The only place that sends the commands of many runs together: one round trip for all that wait.

A client of redis-py takes a connection of its own for every command, which costs a busy process more than all
else it does. Here the commands that come up in one turn of the loop travel as one pipeline; what comes up
while it is on its way waits for the next. A second lane takes what waits for longer than a moment, so that a
connection that does not answer holds up only what is on it.
"""

from __future__ import annotations

import asyncio
import copy
import select
from collections import deque
from contextvars import Context
from typing import Any, NamedTuple

import redis
from redis import exceptions
from redis.utils import HIREDIS_AVAILABLE

from openagents_worker.store.permission import note_command
from openagents_worker.store.redis_errors import not_sent

if HIREDIS_AVAILABLE:
    from hiredis import pack_command

__all__ = ["PipelineBatcher", "has_hung_up"]

LANES = 2
MOST_COMMANDS = 128  # of one pipeline: the first answer is not to wait for a thousand others
LOOK_S = 0.05  # how often the lanes are looked at while something is on its way
TRUSTED_S = 0.5  # a connection that was not used for longer is looked at by its pool before it is used again
HELD_S = 1.0  # then the pool may see that another Redis is the master now, however much there is to carry
_FOR = () if tuple(map(int, redis.__version__.split(".")[:2])) >= (5, 3) else ("EVALSHA",)
"""What a pool wants to hear before it gives a connection; from redis-py 5.3 on, nothing."""
HANGING_UP = sum(getattr(select, name, 0) for name in ("POLLRDHUP", "POLLHUP", "POLLERR"))
SHUT = "the lane was closed before the answer came"

Command = tuple[str | int, ...]


class _QueuedCommand(NamedTuple):
    command: Command
    answer: asyncio.Future[Any]


class PipelineBatcher:
    """Pipelines over the connections of a redis-py pool. One per event loop."""

    def __init__(self, pool: Any, *, answer_timeout_s: float | None, lanes: int = LANES) -> None:
        self._pool = pool
        self._answer_timeout_s = float("inf") if answer_timeout_s is None else answer_timeout_s
        self._lanes = [_Pipeline() for _ in range(lanes)]
        self._waiting: deque[_QueuedCommand] = deque()
        self._called = False
        self._look: asyncio.TimerHandle | None = None

    async def ask(self, *command: str | int) -> Any:
        """The answer to one command. Raises what redis-py raises for it.

        Whoever is cancelled does not get the answer; the command may be carried out all the same.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._waiting.append(_QueuedCommand(command, answer))
        self._call(loop)
        return await answer

    async def close(self) -> None:
        """Give up what is on its way, and what waits."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        for lane in self._lanes:
            if lane.task is not None:
                lane.task.cancel()
                await asyncio.wait([lane.task])
            await self._let_go(lane, broken=False)
        _fail(self._waiting, exceptions.ConnectionError(SHUT))

    def _call(self, loop: asyncio.AbstractEventLoop) -> None:
        """The first lane sets off in the next turn of the loop: by then others may have come.

        As long as it is on its way they wait for it, together; the second is for when it does not come back.
        """
        if self._waiting and not self._called and self._lanes[0].task is None:
            self._called = True
            loop.call_soon(self._go, self._lanes[0])
        if self._look is None:
            self._look = loop.call_later(LOOK_S, self._look_at_lanes)

    def _go(self, lane: _Pipeline) -> None:
        self._called = False
        if self._waiting and lane.task is None:
            # In a context of its own: it is everybody's, not of the run whose command is the first.
            lane.task = asyncio.create_task(self._execute(lane), name="redis lane", context=Context())

    def _look_at_lanes(self) -> None:
        loop = asyncio.get_running_loop()
        for lane in self._lanes:
            lane.note_time(loop.time(), self._answer_timeout_s)
        idle = next((lane for lane in self._lanes if lane.task is None), None)
        held_up = self._waiting and all(lane.task is None or lane.looks > 1 for lane in self._lanes)
        if idle is not None and held_up:
            self._go(idle)
        busy = self._waiting or any(lane.task is not None for lane in self._lanes)
        self._look = loop.call_later(LOOK_S, self._look_at_lanes) if busy else None

    async def _execute(self, lane: _Pipeline) -> None:
        """Carry what waits, and what came meanwhile, until nothing waits any more."""
        asked: deque[_QueuedCommand] = deque()
        loop = asyncio.get_running_loop()
        try:
            if lane.connection is not None and has_hung_up(lane.connection):
                await self._let_go(lane, broken=True)  # nothing was sent on it: another one may carry it all
            while self._waiting:
                connection = await self._connection(lane, loop.time())
                if not self._waiting:
                    break
                asked = self._next()
                lane.sets_off(loop.time())
                await connection.send_packed_command(_packed(connection, asked))
                await _hand_out(connection, asked)
                lane.arrives()
        except BaseException as error:
            late = isinstance(error, asyncio.CancelledError) and lane.is_late
            lost: Exception = exceptions.ConnectionError(SHUT)
            if late:
                lost = exceptions.TimeoutError("Timeout reading from socket")
            elif isinstance(error, Exception):
                lost = error
            _fail(asked or self._waiting, lost)
            await self._let_go(lane, broken=True)  # what is still to come would be taken for other answers
            if not (late or isinstance(error, Exception)):
                raise
        finally:
            lane.comes_back()
            self._call(loop)  # what came while this one ended

    def _next(self) -> deque[_QueuedCommand]:
        asked: deque[_QueuedCommand] = deque()
        while self._waiting and len(asked) < MOST_COMMANDS:
            one = self._waiting.popleft()
            if not one.answer.done():  # else nobody waits for it any more
                asked.append(one)
        return asked

    async def _connection(self, lane: _Pipeline, now_s: float) -> Any:
        """The lane's own. Time limits are the lane's: one for each answer costs more than to read it."""
        if lane.connection is not None and (now_s - lane.used_s > TRUSTED_S or now_s - lane.taken_s > HELD_S):
            await self._let_go(lane, broken=False)
        if lane.connection is None:
            lane.taken_s = now_s
            with not_sent():
                lane.connection = await self._pool.get_connection(*_FOR)
            lane.limit_s, lane.connection.socket_timeout = lane.connection.socket_timeout, None
        return lane.connection

    async def _let_go(self, lane: _Pipeline, *, broken: bool) -> None:
        connection, lane.connection = lane.connection, None
        if connection is not None:
            connection.socket_timeout = lane.limit_s
            if broken:
                await connection.disconnect(nowait=True)
            await self._pool.release(connection)


class _Pipeline:
    """A connection, and what is on its way on it."""

    def __init__(self) -> None:
        self.connection: Any = None
        self.limit_s: float | None = None
        self.task: asyncio.Task[None] | None = None
        self.looks = 0  # how often it was looked at since it set off
        self.taken_s = 0.0  # when the pool gave the connection
        self.used_s = 0.0
        self.is_late = False
        self._off_s: float | None = None

    def sets_off(self, now_s: float) -> None:
        self.looks, self.used_s, self._off_s = 0, now_s, now_s

    def arrives(self) -> None:
        """All answers are there: whatever the lane waits for now, it is not Redis's to give one."""
        self._off_s = None

    def comes_back(self) -> None:
        self.arrives()
        self.task, self.looks, self.is_late = None, 0, False

    def note_time(self, now_s: float, limit_s: float) -> None:
        """Looked at while it is on its way: one that takes too long is called back."""
        if self.task is None:
            return
        self.looks += 1
        if self._off_s is not None and now_s - self._off_s > limit_s and not self.is_late:
            self.is_late = True
            self.task.cancel()


async def _hand_out(connection: Any, asked: deque[_QueuedCommand]) -> None:
    """The answers in their order; those left in `asked` have got none."""
    while asked:
        try:
            answer, refused = await connection.read_response(), None
        except exceptions.ResponseError as error:
            answer, refused = None, error
            note_command(error, asked[0].command)
        except (exceptions.BusyLoadingError, exceptions.AuthenticationError) as error:
            # An answer to one command as well; but redis-py closes the connection, and the others have none.
            _tell(asked.popleft().answer, None, error)
            raise exceptions.ConnectionError(SHUT) from error
        _tell(asked.popleft().answer, answer, refused)


def _packed(connection: Any, asked: deque[_QueuedCommand]) -> list[bytes]:
    """The commands as they go over the wire. One that cannot is none of the others': it leaves `asked`."""
    packed: list[bytes] = []
    for one in [asked.popleft() for _ in range(len(asked))]:
        try:
            if HIREDIS_AVAILABLE:  # it writes them in a tenth of the time
                packed.append(pack_command(one.command))  # type: ignore[arg-type]  # its stub means any length
            else:
                packed += connection.pack_command(*one.command)
        except Exception as error:  # noqa: BLE001  # half a character, a value that is no word: its caller's
            _tell(one.answer, None, error)
        else:
            asked.append(one)
    return [b"".join(packed)]


def has_hung_up(connection: Any) -> bool:
    """Whether the other side has closed a connection of redis-py's.

    The kernel is asked: the loop may not have run since, and would not know yet.
    """
    writer = connection._writer
    socket = None if writer is None else writer.get_extra_info("socket")
    if socket is None or not hasattr(select, "poll"):
        return False
    number = socket.fileno()
    if number < 0:
        return True
    look = select.poll()
    look.register(number, HANGING_UP)
    return bool(look.poll(0))


def _tell(answer: asyncio.Future[Any], value: Any, refused: Exception | None) -> None:
    if answer.done():  # whoever asked has been cancelled
        return
    if refused is None:
        answer.set_result(value)
    else:
        answer.set_exception(refused)


def _fail(asked: deque[_QueuedCommand], error: Exception) -> None:
    while asked:
        # A copy each: raised in many tasks, one exception would collect all their traces.
        _tell(asked.popleft().answer, None, copy.copy(error))
