"""Automatic pipelining: the only place that sends the commands of many runs in one round trip.

A client of redis-py takes a connection from its pool for every command. In a busy process this costs more
than everything else. Here, all commands that are issued in one iteration of the event loop are sent as one
pipeline. Commands that are issued during a round trip wait for the next one. If they wait for too long, a
second connection takes them. A connection that does not answer therefore delays only its own commands.
"""

from __future__ import annotations

import asyncio
import copy
import select
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any, NamedTuple

import redis
from redis import exceptions
from redis.asyncio.connection import AbstractConnection
from redis.utils import HIREDIS_AVAILABLE

from openagents_worker.store.permission import set_refused_command
from openagents_worker.store.redis_errors import translate_connect_errors

if HIREDIS_AVAILABLE:
    from hiredis import pack_command

__all__ = ["PipelineBatcher", "has_hung_up"]

PIPELINES = 2
MAX_COMMANDS = 128  # of one round trip: the first answer must not wait for a thousand others
CHECK_S = 0.05  # the pipelines are checked this often while a command waits for its answer
MAX_IDLE_S = 0.5  # a connection that was idle for longer goes back to its pool, which checks it
# A busy connection also goes back to its pool after this time, so that the pool can notice a new master.
MAX_HOLD_S = 1.0
_GET_CONNECTION_ARGS = () if tuple(map(int, redis.__version__.split(".")[:2])) >= (5, 3) else ("EVALSHA",)
"""Arguments of `pool.get_connection`: before redis-py 5.3 it needs the name of a command."""
HANG_UP_EVENTS = sum(getattr(select, name, 0) for name in ("POLLRDHUP", "POLLHUP", "POLLERR"))
CLOSED = "the connection was closed before the answer came"

Command = tuple[str | int, ...]


class _QueuedCommand(NamedTuple):
    command: Command
    answer: asyncio.Future[Any]


class PipelineBatcher:
    """Sends commands as pipelines over connections of a redis-py pool. One instance per event loop.

    `answer_timeout_s` limits a round trip (None: no limit).
    """

    def __init__(self, pool: Any, *, answer_timeout_s: float | None, pipelines: int = PIPELINES) -> None:
        self._pool = pool
        self._answer_timeout_s = float("inf") if answer_timeout_s is None else answer_timeout_s
        self._pipelines = [_Pipeline() for _ in range(pipelines)]
        self._waiting: deque[_QueuedCommand] = deque()
        self._is_start_scheduled = False
        self._next_check: asyncio.TimerHandle | None = None

    def execute(self, *command: str | int) -> asyncio.Future[Any]:
        """Send one command. The future gets its answer, or an exception of redis-py.

        If it is cancelled, Redis may execute the command nevertheless.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._waiting.append(_QueuedCommand(command, answer))
        self._schedule(loop)
        return answer

    async def close(self) -> None:
        """Cancel the round trips, and fail the commands that wait with `ConnectionError`."""
        if self._next_check is not None:
            self._next_check.cancel()
            self._next_check = None
        for pipeline in self._pipelines:
            if pipeline.task is not None:
                pipeline.task.cancel()
                await asyncio.wait([pipeline.task])
            await self._release_connection(pipeline, broken=False)
        _fail_all(self._waiting, exceptions.ConnectionError(CLOSED))

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the first pipeline in the next iteration of the loop, and the periodic check.

        The delay lets other commands join the same round trip. Commands that are issued during the round
        trip wait for its end. The second pipeline is started only by the check, when the first one is slow.
        """
        if self._waiting and not self._is_start_scheduled and self._pipelines[0].task is None:
            self._is_start_scheduled = True
            loop.call_soon(self._start, self._pipelines[0])
        if self._next_check is None:
            self._next_check = loop.call_later(CHECK_S, self._check_pipelines)

    def _start(self, pipeline: _Pipeline) -> None:
        self._is_start_scheduled = False
        if self._waiting and pipeline.task is None:
            # An empty context: the task serves all runs, so it must not inherit the context of one run.
            pipeline.task = asyncio.create_task(
                self._execute(pipeline), name="redis pipeline", context=Context()
            )

    def _check_pipelines(self) -> None:
        loop = asyncio.get_running_loop()
        for pipeline in self._pipelines:
            pipeline.check_time(loop.time(), self._answer_timeout_s)
        idle = next((pipeline for pipeline in self._pipelines if pipeline.task is None), None)
        all_are_slow = self._waiting and all(
            pipeline.task is None or pipeline.checks > 1 for pipeline in self._pipelines
        )
        if idle is not None and all_are_slow:
            self._start(idle)
        busy = self._waiting or any(pipeline.task is not None for pipeline in self._pipelines)
        self._next_check = loop.call_later(CHECK_S, self._check_pipelines) if busy else None

    async def _execute(self, pipeline: _Pipeline) -> None:
        """Send the commands that wait, one round trip after the other, until no command waits."""
        pending: deque[_QueuedCommand] = deque()
        loop = asyncio.get_running_loop()
        try:
            if pipeline.connection is not None and pipeline.has_hung_up():
                # No command is lost: none was sent on this connection yet.
                await self._release_connection(pipeline, broken=True)
            while self._waiting:
                connection = await self._connection(pipeline, loop.time())
                if not self._waiting:
                    break
                pending = self._next_commands()
                pipeline.begin_round_trip(loop.time())
                await connection.send_packed_command(_pack(connection, pending))
                await _read_answers(connection, pending)
                pipeline.end_round_trip()
        except BaseException as error:
            timed_out = isinstance(error, asyncio.CancelledError) and pipeline.is_timed_out
            lost: Exception = exceptions.ConnectionError(CLOSED)
            if timed_out:
                lost = exceptions.TimeoutError("Timeout reading from socket")
            elif isinstance(error, Exception):
                lost = error
            _fail_all(pending or self._waiting, lost)
            # Close it: later commands would otherwise read the answers that are still to come.
            await self._release_connection(pipeline, broken=True)
            if not (timed_out or isinstance(error, Exception)):
                raise
        finally:
            pipeline.end_task()
            self._schedule(loop)  # for commands that were issued while this task ended

    def _next_commands(self) -> deque[_QueuedCommand]:
        pending: deque[_QueuedCommand] = deque()
        while self._waiting and len(pending) < MAX_COMMANDS:
            one = self._waiting.popleft()
            if not one.answer.done():  # it is done when its caller was cancelled
                pending.append(one)
        return pending

    async def _connection(self, pipeline: _Pipeline, now_s: float) -> Any:
        """The connection of this pipeline, taken from the pool if necessary.

        Its own time limit is switched off, because a timer for each answer costs more than reading it. The
        periodic check limits the whole round trip instead.
        """
        if pipeline.connection is not None and (
            now_s - pipeline.used_s > MAX_IDLE_S or now_s - pipeline.acquired_s > MAX_HOLD_S
        ):
            await self._release_connection(pipeline, broken=False)
        if pipeline.connection is None:
            pipeline.acquired_s = now_s
            with translate_connect_errors():
                pipeline.connection = await self._pool.get_connection(*_GET_CONNECTION_ARGS)
            pipeline.answer_timeout_s, pipeline.connection.socket_timeout = (
                pipeline.connection.socket_timeout,
                None,
            )
            pipeline.hang_up = _HangUp.of(pipeline.connection)
        return pipeline.connection

    async def _release_connection(self, pipeline: _Pipeline, *, broken: bool) -> None:
        connection, pipeline.connection = pipeline.connection, None
        if connection is not None:
            connection.socket_timeout = pipeline.answer_timeout_s
            if broken:
                await connection.disconnect(nowait=True)
            await self._pool.release(connection)


class _Pipeline:
    """One connection, and the task that sends commands on it."""

    def __init__(self) -> None:
        self.connection: Any = None
        self.answer_timeout_s: float | None = None
        self.task: asyncio.Task[None] | None = None
        self.checks = 0  # how often it was checked since the round trip began
        self.acquired_s = 0.0  # loop time at which the pool returned the connection
        self.used_s = 0.0  # loop time at which the last round trip began
        self.is_timed_out = False
        self.hang_up: _HangUp | None = None
        self._began_s: float | None = None

    def has_hung_up(self) -> bool:
        """Whether the server has closed the connection of this pipeline."""
        return self.hang_up is not None and self.hang_up.is_seen_on(self.connection)

    def begin_round_trip(self, now_s: float) -> None:
        self.checks, self.used_s, self._began_s = 0, now_s, now_s

    def end_round_trip(self) -> None:
        """All answers were read: from now on the time limit for answers does not apply."""
        self._began_s = None

    def end_task(self) -> None:
        self.end_round_trip()
        self.task, self.checks, self.is_timed_out = None, 0, False

    def check_time(self, now_s: float, answer_timeout_s: float) -> None:
        """Count a check of the round trip, and cancel it if it takes longer than `answer_timeout_s`."""
        if self.task is None:
            return
        self.checks += 1
        if self._began_s is not None and now_s - self._began_s > answer_timeout_s and not self.is_timed_out:
            self.is_timed_out = True
            self.task.cancel()


async def _read_answers(connection: Any, pending: deque[_QueuedCommand]) -> None:
    """Read one answer for each command, in order. Commands that are left in `pending` got no answer."""
    received = _received_answers(connection)
    while pending:
        try:
            answer = received()
            if isinstance(answer, Exception):
                raise answer
            if type(answer) not in _PLAIN_ANSWERS:
                answer = await connection.read_response()
            error_answer = None
        except exceptions.ResponseError as error:
            answer, error_answer = None, error.with_traceback(None)  # it would refer to this frame
            set_refused_command(error, pending[0].command)
        except (exceptions.BusyLoadingError, exceptions.AuthenticationError) as error:
            # This answers one command, but redis-py then closes the connection: the others get no answer.
            _set_answer(pending.popleft().answer, None, error)
            raise exceptions.ConnectionError(CLOSED) from error
        _set_answer(pending.popleft().answer, answer, error_answer)


_PLAIN_ANSWERS = frozenset({str, list, int, type(None)})
_NOTHING_RECEIVED = object()


def _received_answers(connection: Any) -> Callable[[], Any]:
    """A function that returns the next answer if it was received already, else a mark that is not an answer.

    Most answers of a pipeline arrive together. redis-py's `read_response` takes four coroutines for each.
    """
    reader = getattr(connection._parser, "_reader", None)
    is_own = type(connection).read_response is not AbstractConnection.read_response
    # A push notification (RESP3) is for redis-py: such connections subscribe to nothing, so none is expected.
    if reader is None or is_own or not hasattr(reader, "gets"):
        return lambda: _NOTHING_RECEIVED
    gets: Callable[[], Any] = reader.gets
    return gets


def _pack(connection: Any, pending: deque[_QueuedCommand]) -> list[bytes]:
    """Encode the commands for the socket. One that cannot be encoded fails alone and leaves `pending`."""
    packed: list[bytes] = []
    for one in [pending.popleft() for _ in range(len(pending))]:
        try:
            if HIREDIS_AVAILABLE:  # it encodes them in a tenth of the time
                packed.append(pack_command(one.command))  # type: ignore[arg-type]  # its stub means any length
            else:
                packed += connection.pack_command(*one.command)
        except Exception as error:  # noqa: BLE001  # a wrong argument is an error of its caller alone
            _set_answer(one.answer, None, error)
        else:
            pending.append(one)
    return [b"".join(packed)]


def has_hung_up(connection: Any) -> bool:
    """Whether the server has closed this connection of redis-py.

    Asks the kernel: the event loop may not have run since then, so redis-py may not know yet.
    """
    hang_up = _HangUp.of(connection)
    return hang_up is not None and hang_up.is_seen_on(connection)


class _HangUp:
    """Asks the kernel whether the server has closed a connection. Made once for each use of a connection."""

    __slots__ = ("_poll", "_socket", "_writer")

    def __init__(self, writer: Any, socket: Any) -> None:
        self._writer = writer
        self._socket = socket
        self._poll: Any = None

    @classmethod
    def of(cls, connection: Any) -> _HangUp | None:
        """None if the connection is not open, or if this system cannot be asked."""
        writer = connection._writer
        socket = None if writer is None else writer.get_extra_info("socket")
        return None if socket is None or not hasattr(select, "poll") else cls(writer, socket)

    def is_seen_on(self, connection: Any) -> bool:
        number = self._socket.fileno()
        if number < 0 or connection._writer is not self._writer or self._writer.is_closing():
            return True
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(number, HANG_UP_EVENTS)
        return bool(self._poll.poll(0))


def _set_answer(answer: asyncio.Future[Any], value: Any, error_answer: Exception | None) -> None:
    if answer.done():  # its caller was cancelled
        return
    if error_answer is None:
        answer.set_result(value)
    else:
        answer.set_exception(error_answer)


def _fail_all(pending: deque[_QueuedCommand], error: Exception) -> None:
    while pending:
        # A copy for each: one exception that is raised in many tasks collects all their tracebacks.
        _set_answer(pending.popleft().answer, None, copy.copy(error))
