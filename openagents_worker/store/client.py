"""The Redis client: the only place that opens connections to Redis.

Connection pools have a fixed size. redis-py does not retry commands. Its errors are translated once.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import random
import time
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import redis
import redis.asyncio as redis_async
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from openagents_worker.errors import RedisRefused, RedisUnreachable
from openagents_worker.loops import PerLoop, at_fork
from openagents_worker.redaction import safe_url
from openagents_worker.store.batching import PipelineBatcher, has_hung_up
from openagents_worker.store.durability import (
    WAITAOF,
    WAITAOF_TIMEOUT_MS,
    PersistenceInfo,
    queue_persistence_commands,
)
from openagents_worker.store.keys import Keys
from openagents_worker.store.permission import (
    DEFAULT_USER,
    add_rights_to_refusal,
    is_no_permission,
    missing_rights_error,
    user_of,
)
from openagents_worker.store.redis_clients import AsyncRedisClient, RedisClient
from openagents_worker.store.redis_errors import (
    CONNECTION_LOST,
    AnswerLost,
    connection_broke,
    is_temporary_refusal,
    translate_connect_errors,
    translate_errors,
)
from openagents_worker.store.redis_options import connection_options, lossy_text_options
from openagents_worker.store.scripts import Script, ScriptCall, lacking
from openagents_worker.telemetry.signals import inner_span

__all__ = ["AnswerLost", "AsyncStore", "Cell", "Plan", "Reader", "Store", "is_temporary_refusal"]

T = TypeVar("T")
Plan = Generator[Any, Any, T]
"""A sequence of Redis operations that both the sync and the async store can execute (`Store.execute`).

The generator yields script calls (`ScriptCall`) and functions as for `Store.ask`, receives their answers, and
returns its result."""

CONNECT_TIMEOUT_S = 1.5  # with two addresses of a host, a failure is reported in less than five seconds
ANSWER_TIMEOUT_S = 2.0
POOL_TIMEOUT_S = 10.0  # to wait for a free connection: a thousand runs of a process may need one at once
MAX_CONNECTIONS = 32  # Redis executes commands in one thread: more connections do not make it faster


@dataclass(frozen=True, slots=True)
class Cell:
    """One Redis with one key prefix, and the limits of what is stored there.

    `events_maxlen` is the number of events that are kept of a run. The times are in milliseconds.
    """

    url: str = field(repr=False)  # it may contain a password
    prefix: str = "oa"
    events_maxlen: int = 10_000
    run_ttl_ms: int = 7 * 24 * 3_600_000
    session_ttl_ms: int = 30 * 24 * 3_600_000
    max_watchers: int = 1_000
    """The number of watchers that may be open in one process at the same time."""

    @property
    def keys(self) -> Keys:
        return Keys(self.prefix)

    @property
    def common(self) -> tuple[int, int, int]:
        """The arguments that every script gets first, in the order of `scripts._COMMON`."""
        return (self.events_maxlen, self.run_ttl_ms, self.session_ttl_ms)


# Otherwise, redis-py 7 and later reads its version from the package metadata for every connection, and sends
# it to the server with two additional commands.
_NO_DRIVER_INFO = {"driver_info": None} if importlib.util.find_spec("redis.driver_info") else {}


def _tracked_class(connection_class: Any) -> Any:
    """A subclass of a redis-py connection class with three changes.

    A failed connect raises `NotSent`. A cancellation is never lost (see below). The class attribute `opened`
    has all open connections; each pool has its own subclass.
    """

    opened_connections: weakref.WeakSet[Any] = weakref.WeakSet()

    class AsyncTrackedConnection(connection_class):  # type: ignore[misc]  # a base known only at run time
        opened = opened_connections
        socket_timeout: float | None

        async def connect(self, *args: Any, **kwargs: Any) -> None:
            with translate_connect_errors():
                if self.is_connected and has_hung_up(self):
                    await self.disconnect(nowait=True)
                await super().connect(*args, **kwargs)
            self.opened.add(self)

        async def disconnect(self, *args: Any, **kwargs: Any) -> None:
            # redis-py waits until the server ends TLS. If that takes too long, or if the wait is cancelled,
            # redis-py leaves the socket open.
            writer = self._writer
            try:
                await super().disconnect(*args, **kwargs)
            except exceptions.TimeoutError:
                pass  # the transport is closed below in any case
            finally:
                if writer is not None:
                    writer.transport.abort()

        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            # redis-py sends with asyncio.wait_for. Before Python 3.12, wait_for can swallow a cancellation
            # that arrives while it returns, and it starts a task for every command.
            timeout_s, self.socket_timeout = self.socket_timeout, None
            if timeout_s is None:
                await super().send_packed_command(command, check_health)
                return
            try:
                async with asyncio.timeout(timeout_s):
                    await super().send_packed_command(command, check_health)
            except TimeoutError as error:
                raise exceptions.TimeoutError("Timeout writing to socket") from error
            finally:
                self.socket_timeout = timeout_s

    class TrackedConnection(connection_class):  # type: ignore[misc]
        opened = opened_connections

        def connect(self, *args: Any, **kwargs: Any) -> None:
            with translate_connect_errors():
                super().connect(*args, **kwargs)
            self.opened.add(self)

    return (
        AsyncTrackedConnection if inspect.iscoroutinefunction(connection_class.connect) else TrackedConnection
    )


def _pool(
    pool_class: Any,
    cell: Cell,
    retry: Any,
    *,
    max_connections: int,
    answer_timeout_s: float | None,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    pool_timeout_s: float = ANSWER_TIMEOUT_S,
) -> Any:
    options = {
        **lossy_text_options(),
        "socket_connect_timeout": connect_timeout_s,
        "socket_timeout": answer_timeout_s,
        "retry": retry,
        "max_connections": max_connections,
        "timeout": pool_timeout_s,
        "health_check_interval": 0,
        "client_name": "openagents",
        **_NO_DRIVER_INFO,
    }
    options |= connection_options(pool_class, cell.url, connect_timeout_s, answer_timeout_s)
    pool = pool_class(**options)
    pool.connection_class = _tracked_class(pool.connection_class)
    return pool


def _raise_temporary_refusal(answers: list[Any]) -> list[Any]:
    """The answers of a pipeline. Raises the first one by which Redis refuses commands temporarily."""
    for answer in answers:
        if isinstance(answer, Exception) and is_temporary_refusal(answer):
            raise answer
    return answers


def _require_on_disk(reply: Any, waitaof_answer: Any, cell: Cell) -> Any:
    """The reply of the script. Raises `AnswerLost` if Redis has not confirmed that its writes are on disk."""
    for answer in (reply, waitaof_answer):
        if isinstance(answer, Exception):
            raise answer
    if not int(waitaof_answer[0]):
        raise AnswerLost(
            f"Redis at {safe_url(cell.url)} has the run, but not on disk within {WAITAOF_TIMEOUT_MS} ms"
        )
    return reply


class _ScriptPermissions:
    """Which scripts this process is known to be allowed to run.

    The first run of a script checks all rights of the Redis user that the script needs. An ACL user may lose
    a right later, so its scripts check their rights in every run, in a short form. After a refusal, each
    script is checked completely again, so that the error names every missing right.
    """

    def __init__(self, cell: Cell) -> None:
        self._prefix = cell.prefix
        self._has_acl = user_of(cell.url) != DEFAULT_USER
        self._permitted: set[str] = set()

    def source_to_run(self, script: Script) -> tuple[str, str]:
        """SHA-1 and source of the script, with the check of rights that this run needs."""
        if script.sha not in self._permitted:
            return script.checking()
        return script.guarded if self._has_acl else (script.sha, script.source)

    def mark_permitted(self, script: Script) -> None:
        """The script was executed, so the user had all rights."""
        if script.sha not in self._permitted:
            self._permitted.add(script.sha)

    def handle_error(self, script: Script, error: Exception) -> None:
        """If the error is a refusal, check all scripts again and add the missing rights to the error."""
        if is_no_permission(error):
            self._permitted.clear()
            add_rights_to_refusal(error, script.rights, self._prefix)


def _check_waitaof_right(missing: tuple[int, ...], url: str) -> None:
    """Raises `RedisNoPermission` if WAITAOF is not allowed. `missing` is the reply of `lacking`."""
    if missing:
        raise missing_rights_error([f"+{WAITAOF[0].lower()}"], safe_url(url), user_of(url))


class Store:
    """The store for synchronous callers: producers, the command line, the heartbeat thread."""

    def __init__(
        self,
        cell: Cell,
        *,
        max_connections: int = 16,
        answer_timeout_s: float | None = ANSWER_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self.cell = cell
        self.keys = cell.keys
        pool = _pool(
            redis.BlockingConnectionPool,
            cell,
            Retry(NoBackoff(), 0),
            max_connections=max_connections,
            answer_timeout_s=answer_timeout_s,
            connect_timeout_s=connect_timeout_s,
        )
        self.redis = RedisClient(connection_pool=pool)
        self._persistence_info: PersistenceInfo | None = None
        self._script_permissions = _ScriptPermissions(cell)
        at_fork(self)

    def start_afresh(self) -> None:
        """After a fork: close the inherited sockets in the child. The connections of the parent stay open."""
        pool: Any = self.redis.connection_pool
        for connection in list(pool.connection_class.opened):
            with suppress(Exception):
                connection.disconnect()  # in a child process, redis-py only closes its copy of the socket
        pool.reset()

    def run(self, call: ScriptCall[T]) -> T:
        """Run a script once. Raises `RedisUnreachable`, or `AnswerLost` if it may have been executed."""
        argv = call.argv(self.cell.common)
        with inner_span(*call.script.signal):
            return call.parse(self.use(lambda r: self._run_script(r, call, argv)))

    def _run_script(self, client: Any, call: ScriptCall[Any], argv: list[Any]) -> Any:
        sha, source = self._script_permissions.source_to_run(call.script)
        try:
            try:
                reply = client.evalsha(sha, 1, self.cell.prefix, *argv)
            except exceptions.NoScriptError:
                reply = client.eval(source, 1, self.cell.prefix, *argv)
        except exceptions.ResponseError as error:
            self._script_permissions.handle_error(call.script, error)
            raise
        self._script_permissions.mark_permitted(call.script)
        return reply

    def run_on_disk(self, call: ScriptCall[T]) -> T:
        """Run a script once and wait until its writes are on disk.

        Raises the errors of `run`; `AnswerLost` also if Redis does not confirm the write in time. Raises
        `RedisUnsafe` before the script runs if this Redis cannot confirm writes at all.
        """
        if self._persistence_info is None:
            persistence_info = self.persistence_info()
            persistence_info.check_disk()
            if persistence_info.can_wait_for_disk:
                _check_waitaof_right(self.run(lacking(commands=[WAITAOF[0]], keys=[""])), self.cell.url)
            self._persistence_info = persistence_info
        if not self._persistence_info.can_wait_for_disk:
            return self.run(call)  # with `appendfsync always`, Redis answers after the write to disk
        argv = call.argv(self.cell.common)
        return call.parse(self.use(lambda r: self._run_script_on_disk(r, call.script, argv)))

    def _run_script_on_disk(self, client: Any, script: Script, argv: list[Any]) -> Any:
        """Send both commands on one connection: WAITAOF waits for the writes of its own connection."""
        reply = waitaof_answer = None
        sha, source = self._script_permissions.source_to_run(script)
        for verb in (("EVALSHA", sha), ("EVAL", source)):
            with client.pipeline(transaction=False) as pipe:
                pipe.execute_command(*verb, 1, self.cell.prefix, *argv)
                pipe.execute_command(*WAITAOF)
                reply, waitaof_answer = pipe.execute(raise_on_error=False)
            if not isinstance(reply, exceptions.NoScriptError):
                break
        if isinstance(reply, exceptions.ResponseError):
            self._script_permissions.handle_error(script, reply)
        else:
            self._script_permissions.mark_permitted(script)
        return _require_on_disk(reply, waitaof_answer, self.cell)

    def persistence_info(self) -> PersistenceInfo:
        """Read the persistence settings of this Redis."""
        with self.redis.pipeline(transaction=False) as pipe:
            return PersistenceInfo.of(
                self.ask(
                    lambda _: _raise_temporary_refusal(
                        queue_persistence_commands(pipe).execute(raise_on_error=False)
                    )
                )
            )

    def ask(self, question: Callable[[Any], T]) -> T:
        """Read with the redis-py client: `store.ask(lambda r: r.hgetall(key))`.

        Repeats the read once if its connection broke, so the function must not write. Raises
        `RedisUnreachable` and its subclasses.
        """
        with translate_errors(self.cell.url):
            try:
                return question(self.redis)
            except CONNECTION_LOST as error:
                if not connection_broke(error):
                    raise
                return question(self.redis)

    def use(self, work: Callable[[Any], T]) -> T:
        """Call a function once with the redis-py client, and translate its errors. It may write."""
        with translate_errors(self.cell.url):
            return work(self.redis)

    def execute(self, plan: Plan[T], execute_other: Callable[[Any], object] | None = None) -> T:
        """Execute the steps of a plan. `execute_other` gets the steps that are neither scripts nor reads."""
        answer: Any = None
        with closing(plan):
            while True:
                try:
                    step = plan.send(answer)
                except StopIteration as done:
                    value: T = done.value
                    return value
                answer = _execute_step(self, step, execute_other)

    def close(self) -> None:
        self.redis.close()
        self.redis.connection_pool.disconnect()


class Reader(Protocol):
    """The part of `AsyncStore` that readers need. The runtime passes an object that adds its own checks."""

    @property
    def keys(self) -> Keys: ...

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T: ...


class _LoopConnections:
    """The client and the connections of an async store on one event loop."""

    def __init__(self, pool: Any, answer_timeout_s: float | None) -> None:
        self.redis = AsyncRedisClient(connection_pool=pool)
        self.batcher = PipelineBatcher(pool, answer_timeout_s=answer_timeout_s)
        self._pool = pool

    async def close(self) -> None:
        await self.batcher.close()
        await self._pool.disconnect()

    def transports(self) -> Iterable[Any]:
        """The asyncio transports of the open connections."""
        writers = [connection._writer for connection in self._pool.connection_class.opened]
        return [writer.transport for writer in writers if writer is not None]

    def forget(self) -> None:
        """Forget the streams of the connections, whose transports were closed without the event loop."""
        for connection in list(self._pool.connection_class.opened):
            connection._reader = connection._writer = None


class AsyncStore:
    """The store for asyncio. It may be used on several event loops: each loop has its own connections.

    The connections of a loop are closed by `close` on that loop, or when `asyncio.run` ends. If the loop was
    closed in another way, they are closed when the store opens connections on another loop.
    """

    def __init__(
        self,
        cell: Cell,
        *,
        max_connections: int = MAX_CONNECTIONS,
        answer_timeout_s: float | None = 5.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.cell = cell
        self._max_connections = max_connections
        self._answer_timeout_s = answer_timeout_s
        self._unused_pool: Any = self._make_pool()  # an invalid URL raises here
        self._on_loops: PerLoop[_LoopConnections] = PerLoop(self._connect)
        self._persistence_info: PersistenceInfo | None = None
        self._script_permissions = _ScriptPermissions(cell)
        self._sleep = sleep

    def _make_pool(self) -> Any:
        return _pool(
            redis_async.BlockingConnectionPool,
            self.cell,
            AsyncRetry(NoBackoff(), 0),
            max_connections=self._max_connections,
            answer_timeout_s=self._answer_timeout_s,
            pool_timeout_s=POOL_TIMEOUT_S,
        )

    def _connect(self) -> _LoopConnections:
        unused, self._unused_pool = self._unused_pool, None
        return _LoopConnections(unused or self._make_pool(), self._answer_timeout_s)

    @property
    def redis(self) -> redis_async.Redis:
        """The redis-py client of the running event loop."""
        return self._on_loops.here().redis

    @property
    def _batcher(self) -> PipelineBatcher:
        return self._on_loops.here().batcher

    @property
    def keys(self) -> Keys:
        return self.cell.keys

    async def run(self, call: ScriptCall[T]) -> T:
        """As `Store.run`."""
        with inner_span(*call.script.signal), translate_errors(self.cell.url):
            return call.parse(await self._run_script(call.script, call.argv(self.cell.common)))

    async def run_until(self, call: ScriptCall[T], until: Callable[[], bool]) -> T:
        """Run a script, and repeat it while Redis is unreachable, until `until()` returns True."""
        return await self._retry(lambda: self.run(call), until)

    async def ask_until(self, question: Callable[[Any], Awaitable[T]], until: Callable[[], bool]) -> T:
        """As `ask`, but repeats the read while Redis is unreachable, until `until()` returns True."""
        return await self._retry(lambda: self.ask(question), until)

    async def _retry(self, work: Callable[[], Awaitable[T]], until: Callable[[], bool]) -> T:
        delay_s = 0.05
        while True:
            try:
                return await work()
            except RedisRefused:
                raise  # Redis would refuse it again
            except RedisUnreachable:
                if until():
                    raise
                # With jitter: runs must not retry at the same time.
                await self._sleep(delay_s * (0.5 + random.random()))
                delay_s = min(delay_s * 2, 1.0)

    async def _run_script(self, script: Script, argv: list[Any]) -> Any:
        sha, source = self._script_permissions.source_to_run(script)
        try:
            reply = await self._send_script(sha, source, argv)
        except exceptions.ResponseError as error:
            self._script_permissions.handle_error(script, error)
            raise
        self._script_permissions.mark_permitted(script)
        return reply

    async def _send_script(self, sha: str, source: str, argv: list[Any]) -> Any:
        try:
            return await self._batcher.execute("EVALSHA", sha, 1, self.cell.prefix, *argv)
        except exceptions.NoScriptError:
            await self._batcher.execute("SCRIPT", "LOAD", source)
        try:
            return await self._batcher.execute("EVALSHA", sha, 1, self.cell.prefix, *argv)
        except exceptions.NoScriptError:  # another Redis has become the master, or the scripts were flushed
            return await self._batcher.execute("EVAL", source, 1, self.cell.prefix, *argv)

    async def run_on_disk(self, call: ScriptCall[T]) -> T:
        """As `Store.run_on_disk`."""
        if self._persistence_info is None:
            persistence_info = await self.persistence_info()
            persistence_info.check_disk()
            if persistence_info.can_wait_for_disk:
                _check_waitaof_right(await self.run(lacking(commands=[WAITAOF[0]], keys=[""])), self.cell.url)
            self._persistence_info = persistence_info
        if not self._persistence_info.can_wait_for_disk:
            return await self.run(call)
        argv = call.argv(self.cell.common)
        return call.parse(await self.use(lambda r: self._run_script_on_disk(r, call.script, argv)))

    async def _run_script_on_disk(self, client: Any, script: Script, argv: list[Any]) -> Any:
        # Not with the batcher: this waits for the disk, and commands of other runs would wait behind it.
        reply = waitaof_answer = None
        sha, source = self._script_permissions.source_to_run(script)
        for verb in (("EVALSHA", sha), ("EVAL", source)):
            async with client.pipeline(transaction=False) as pipe:
                pipe.execute_command(*verb, 1, self.cell.prefix, *argv)
                pipe.execute_command(*WAITAOF)
                reply, waitaof_answer = await pipe.execute(raise_on_error=False)
            if not isinstance(reply, exceptions.NoScriptError):
                break
        if isinstance(reply, exceptions.ResponseError):
            self._script_permissions.handle_error(script, reply)
        else:
            self._script_permissions.mark_permitted(script)
        return _require_on_disk(reply, waitaof_answer, self.cell)

    async def persistence_info(self) -> PersistenceInfo:
        """Read the persistence settings of this Redis."""
        async with self.redis.pipeline(transaction=False) as pipe:

            async def ask(_: Any) -> list[Any]:
                return _raise_temporary_refusal(
                    await queue_persistence_commands(pipe).execute(raise_on_error=False)
                )

            return PersistenceInfo.of(await self.ask(ask))

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """As `Store.ask`: `await store.ask(lambda r: r.hgetall(key))`."""
        with translate_errors(self.cell.url):
            try:
                return await question(self.redis)
            except CONNECTION_LOST as error:
                if not connection_broke(error):
                    raise
                return await question(self.redis)

    async def use(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """As `Store.use`."""
        with translate_errors(self.cell.url):
            return await work(self.redis)

    async def execute(
        self, plan: Plan[T], execute_other: Callable[[Any], Awaitable[object]] | None = None
    ) -> T:
        """As `Store.execute`."""
        answer: Any = None
        with closing(plan):
            while True:
                try:
                    step = plan.send(answer)
                except StopIteration as done:
                    value: T = done.value
                    return value
                answer = await _execute_step(self, step, execute_other)

    def leave_closed_loops(self) -> None:
        """Close what is left of loops that are closed."""
        self._on_loops.close_closed_loops()

    async def close(self) -> None:
        """Close the connections of the running event loop, and those of event loops that are closed."""
        await self._on_loops.close()


def _execute_step(store: Store | AsyncStore, step: Any, execute_other: Callable[[Any], Any] | None) -> Any:
    """The answer to one step of a plan; for an async store, an awaitable of it."""
    if isinstance(step, ScriptCall):
        return store.run(step)
    if callable(step):
        return store.ask(step)
    assert execute_other is not None, step
    return execute_other(step)


def monotonic_deadline(seconds: float) -> Callable[[], bool]:
    """A function that returns True once so many seconds have passed, for `AsyncStore.run_until`."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end
