"""The connection. The only place that opens one: sized pools, no blind retries, errors translated once."""

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
    WAIT_FOR_DISK,
    WAIT_FOR_DISK_MS,
    PersistenceInfo,
    ask_persistence,
)
from openagents_worker.store.keys import Keys
from openagents_worker.store.permission import (
    DEFAULT_USER,
    is_no_permission,
    lacking_words,
    note_rights,
    user_of,
)
from openagents_worker.store.redis_clients import AsyncClient, Client
from openagents_worker.store.redis_errors import (
    CONNECTION_LOST,
    AnswerLost,
    connection_broke,
    not_sent,
    refuses_now,
    translating,
)
from openagents_worker.store.redis_options import options_of, reading_any_bytes
from openagents_worker.store.scripts import Script, ScriptCall, lacking

__all__ = ["AnswerLost", "AsyncStore", "Cell", "Plan", "Reader", "Store", "refuses_now"]

T = TypeVar("T")
Plan = Generator[Any, Any, T]
"""A sequence of questions to Redis, for a sync and an async store alike. It yields script calls
(`ScriptCall`) and functions as for `ask`, is sent their answers, and returns its result."""

CONNECT_TIMEOUT_S = 1.5  # a closed or silent port is known in less than five seconds, two addresses included
ANSWER_TIMEOUT_S = 2.0
TURN_TIMEOUT_S = 10.0  # for a connection, where a thousand runs of one process may want one at once
MAX_CONNECTIONS = 32  # Redis has one thread: more of them only cost their making


@dataclass(frozen=True, slots=True)
class Cell:
    """One Redis with one prefix, and how long things stay in it (milliseconds)."""

    url: str = field(repr=False)  # it holds a password
    prefix: str = "oa"
    events_maxlen: int = 10_000
    run_ttl_ms: int = 7 * 24 * 3_600_000
    session_ttl_ms: int = 30 * 24 * 3_600_000
    max_watchers: int = 1_000
    """How many may follow events in one process at once."""

    @property
    def keys(self) -> Keys:
        return Keys(self.prefix)

    @property
    def common(self) -> tuple[int, int, int]:
        return (self.events_maxlen, self.run_ttl_ms, self.session_ttl_ms)


# redis-py 7 and newer would look its own version up in the package's metadata for every connection it makes,
# and tell it to the server in two commands more.
_SAYS_LITTLE = {"driver_info": None} if importlib.util.find_spec("redis.driver_info") else {}


def _telling(connection_class: Any) -> Any:
    """The same connection class, which says when it was connecting that failed, and loses no cancellation.

    It also knows which of its connections were `opened`; each pool has a class of its own.
    """

    opened_here: weakref.WeakSet[Any] = weakref.WeakSet()

    class AsyncTelling(connection_class):  # type: ignore[misc]  # a base known only at run time
        opened = opened_here
        socket_timeout: float | None

        async def connect(self, *args: Any, **kwargs: Any) -> None:
            with not_sent():
                if self.is_connected and has_hung_up(self):
                    await self.disconnect(nowait=True)
                await super().connect(*args, **kwargs)
            self.opened.add(self)

        async def disconnect(self, *args: Any, **kwargs: Any) -> None:
            # redis-py waits for the other side to end TLS. When that takes too long, or when the waiting is
            # cancelled, it leaves the socket open.
            writer = self._writer
            try:
                await super().disconnect(*args, **kwargs)
            except exceptions.TimeoutError:
                pass  # the connection is given up here all the same
            finally:
                if writer is not None:
                    writer.transport.abort()

        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            # redis-py sends through asyncio.wait_for, which below Python 3.12 can swallow a cancellation that
            # comes while it ends, and starts a task for every command.
            limit_s, self.socket_timeout = self.socket_timeout, None
            if limit_s is None:
                await super().send_packed_command(command, check_health)
                return
            try:
                async with asyncio.timeout(limit_s):
                    await super().send_packed_command(command, check_health)
            except TimeoutError as error:
                raise exceptions.TimeoutError("Timeout writing to socket") from error
            finally:
                self.socket_timeout = limit_s

    class Telling(connection_class):  # type: ignore[misc]
        opened = opened_here

        def connect(self, *args: Any, **kwargs: Any) -> None:
            with not_sent():
                super().connect(*args, **kwargs)
            self.opened.add(self)

    return AsyncTelling if inspect.iscoroutinefunction(connection_class.connect) else Telling


def _pool(
    pool_class: Any,
    cell: Cell,
    retry: Any,
    *,
    max_connections: int,
    answer_timeout_s: float | None,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    turn_timeout_s: float = ANSWER_TIMEOUT_S,
) -> Any:
    options = {
        **reading_any_bytes(),
        "socket_connect_timeout": connect_timeout_s,
        "socket_timeout": answer_timeout_s,
        "retry": retry,
        "max_connections": max_connections,
        "timeout": turn_timeout_s,
        "health_check_interval": 0,
        "client_name": "openagents",
        **_SAYS_LITTLE,
    }
    options |= options_of(pool_class, cell.url, connect_timeout_s, answer_timeout_s)
    pool = pool_class(**options)
    pool.connection_class = _telling(pool.connection_class)
    return pool


def _answers(answers: list[Any]) -> list[Any]:
    """The answers of a pipeline; what a Redis that takes no command now refuses is no answer."""
    for answer in answers:
        if isinstance(answer, Exception) and refuses_now(answer):
            raise answer
    return answers


def _known_on_disk(reply: Any, synced: Any, cell: Cell) -> Any:
    """The script's reply, once Redis has said that what it wrote is on disk."""
    for answer in (reply, synced):
        if isinstance(answer, Exception):
            raise answer
    if not int(synced[0]):
        raise AnswerLost(
            f"Redis at {safe_url(cell.url)} has the run, but not on disk within {WAIT_FOR_DISK_MS} ms"
        )
    return reply


class _Permissions:
    """Which scripts this process may run, as far as Redis has said so. The first run of each one asks.

    A user of an ACL may lose a right afterwards: its scripts ask each time, in short. When one is refused,
    all are asked for in full again, so that the error names every right that is missing.
    """

    def __init__(self, cell: Cell) -> None:
        self._prefix = cell.prefix
        self._has_acl = user_of(cell.url) != DEFAULT_USER
        self._permitted: set[str] = set()

    def text(self, script: Script) -> tuple[str, str]:
        """SHA-1 and source of the script as it is to be run now."""
        if script.sha not in self._permitted:
            return script.checking()
        return script.guarded if self._has_acl else (script.sha, script.source)

    def note(self, script: Script) -> None:
        """It was run."""
        if script.sha not in self._permitted:
            self._permitted.add(script.sha)

    def refused(self, script: Script, error: Exception) -> None:
        if is_no_permission(error):
            self._permitted.clear()
            note_rights(error, script.rights, self._prefix)


def _check_may_wait(positions: tuple[int, ...], url: str) -> None:
    """Raises `RedisNoPermission` when the user lacks the command that waits for the disk."""
    if positions:
        raise lacking_words([f"+{WAIT_FOR_DISK[0].lower()}"], safe_url(url), user_of(url))


class Store:
    """The store for synchronous callers: producers, the command line, the heartbeat's thread."""

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
        self.redis = Client(connection_pool=pool)
        self._keeping: PersistenceInfo | None = None
        self._permissions = _Permissions(cell)
        at_fork(self)

    def start_afresh(self) -> None:
        """Close what a child has inherited; its parent's connections stay open."""
        pool: Any = self.redis.connection_pool
        for connection in list(pool.connection_class.opened):
            with suppress(Exception):
                connection.disconnect()  # in another process than its own it only closes its socket
        pool.reset()

    def run(self, call: ScriptCall[T]) -> T:
        """Run a script once. Raises `RedisUnreachable`, or `AnswerLost` when it may have been carried out."""
        argv = call.argv(self.cell.common)
        return call.parse(self.use(lambda r: self._eval(r, call, argv)))

    def _eval(self, client: Any, call: ScriptCall[Any], argv: list[Any]) -> Any:
        sha, source = self._permissions.text(call.script)
        try:
            try:
                reply = client.evalsha(sha, 1, self.cell.prefix, *argv)
            except exceptions.NoScriptError:
                reply = client.eval(source, 1, self.cell.prefix, *argv)
        except exceptions.ResponseError as error:
            self._permissions.refused(call.script, error)
            raise
        self._permissions.note(call.script)
        return reply

    def run_on_disk(self, call: ScriptCall[T]) -> T:
        """Run a script once and wait until what it wrote is on disk.

        Raises as `run` does, `AnswerLost` also when Redis has not said so in time; and `RedisUnsafe`, before
        anything is run, where Redis never could.
        """
        if self._keeping is None:
            keeping = self.keeping()
            keeping.check_disk()
            if keeping.can_wait_for_disk:
                _check_may_wait(self.run(lacking(commands=[WAIT_FOR_DISK[0]], keys=[""])), self.cell.url)
            self._keeping = keeping
        if not self._keeping.can_wait_for_disk:
            return self.run(call)  # it has `appendfsync always`: the answer comes after the disk
        argv = call.argv(self.cell.common)
        return call.parse(self.use(lambda r: self._eval_on_disk(r, call.script, argv)))

    def _eval_on_disk(self, client: Any, script: Script, argv: list[Any]) -> Any:
        """Both commands on one connection: Redis waits for what this connection has seen."""
        reply = synced = None
        sha, source = self._permissions.text(script)
        for verb in (("EVALSHA", sha), ("EVAL", source)):
            with client.pipeline(transaction=False) as pipe:
                pipe.execute_command(*verb, 1, self.cell.prefix, *argv)
                pipe.execute_command(*WAIT_FOR_DISK)
                reply, synced = pipe.execute(raise_on_error=False)
            if not isinstance(reply, exceptions.NoScriptError):
                break
        if isinstance(reply, exceptions.ResponseError):
            self._permissions.refused(script, reply)
        else:
            self._permissions.note(script)
        return _known_on_disk(reply, synced, self.cell)

    def keeping(self) -> PersistenceInfo:
        """What this Redis says of how it keeps what is written."""
        with self.redis.pipeline(transaction=False) as pipe:
            return PersistenceInfo.of(
                self.ask(lambda _: _answers(ask_persistence(pipe).execute(raise_on_error=False)))
            )

    def ask(self, question: Callable[[Any], T]) -> T:
        """Any read: `store.ask(lambda r: r.hgetall(key))`, errors translated.

        It is asked again when its connection broke: a read changes nothing.
        """
        with translating(self.cell.url):
            try:
                return question(self.redis)
            except CONNECTION_LOST as error:
                if not connection_broke(error):
                    raise
                return question(self.redis)

    def use(self, work: Callable[[Any], T]) -> T:
        """Anything else with the client, once, errors translated."""
        with translating(self.cell.url):
            return work(self.redis)

    def execute(self, plan: Plan[T], other: Callable[[Any], object] | None = None) -> T:
        """Do what the plan says; a step that is neither a script nor a question is for `other`."""
        answer: Any = None
        with closing(plan):
            while True:
                try:
                    step = plan.send(answer)
                except StopIteration as done:
                    value: T = done.value
                    return value
                answer = _do(self, step, other)

    def close(self) -> None:
        self.redis.close()
        self.redis.connection_pool.disconnect()


class Reader(Protocol):
    """Where an asyncio reader asks: a store, or somebody who asks one for it."""

    @property
    def keys(self) -> Keys: ...

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T: ...


class _OnLoop:
    """What an async store has open on one event loop."""

    def __init__(self, pool: Any, answer_timeout_s: float | None) -> None:
        self.redis = AsyncClient(connection_pool=pool)
        self.lanes = PipelineBatcher(pool, answer_timeout_s=answer_timeout_s)
        self._pool = pool

    async def close(self) -> None:
        await self.lanes.close()
        await self._pool.disconnect()

    def transports(self) -> Iterable[Any]:
        writers = [connection._writer for connection in self._pool.connection_class.opened]
        return [writer.transport for writer in writers if writer is not None]

    def forget(self) -> None:
        for connection in list(self._pool.connection_class.opened):
            connection._reader = connection._writer = None


class AsyncStore:
    """The store for asyncio, for any event loop: each has connections of its own.

    They are closed by `close` on that loop, when `asyncio.run` ends it, or, where it was closed by hand, when
    anybody opens others.
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
        self._spare_pool: Any = self._make_pool()  # what is wrong with the URL is said now
        self._on_loops: PerLoop[_OnLoop] = PerLoop(self._connect)
        self._keeping: PersistenceInfo | None = None
        self._permissions = _Permissions(cell)
        self._sleep = sleep

    def _make_pool(self) -> Any:
        return _pool(
            redis_async.BlockingConnectionPool,
            self.cell,
            AsyncRetry(NoBackoff(), 0),
            max_connections=self._max_connections,
            answer_timeout_s=self._answer_timeout_s,
            turn_timeout_s=TURN_TIMEOUT_S,
        )

    def _connect(self) -> _OnLoop:
        spare, self._spare_pool = self._spare_pool, None
        return _OnLoop(spare or self._make_pool(), self._answer_timeout_s)

    @property
    def redis(self) -> redis_async.Redis:
        """The client of the running loop."""
        return self._on_loops.here().redis

    @property
    def _lanes(self) -> PipelineBatcher:
        return self._on_loops.here().lanes

    @property
    def keys(self) -> Keys:
        return self.cell.keys

    async def run(self, call: ScriptCall[T]) -> T:
        """Run a script once. Raises `RedisUnreachable`, or `AnswerLost` when it may have been carried out."""
        with translating(self.cell.url):
            return call.parse(await self._eval(call.script, call.argv(self.cell.common)))

    async def run_until(self, call: ScriptCall[T], until: Callable[[], bool]) -> T:
        """Run a script and repeat it while Redis is away, until `until()` says that it is too late."""
        return await self._repeat(lambda: self.run(call), until)

    async def ask_until(self, question: Callable[[Any], Awaitable[T]], until: Callable[[], bool]) -> T:
        """As `ask`, repeated while Redis is away, until `until()` says that it is too late."""
        return await self._repeat(lambda: self.ask(question), until)

    async def _repeat(self, work: Callable[[], Awaitable[T]], until: Callable[[], bool]) -> T:
        delay_s = 0.05
        while True:
            try:
                return await work()
            except RedisRefused:
                raise  # it would be refused again
            except RedisUnreachable:
                if until():
                    raise
                await self._sleep(delay_s * (0.5 + random.random()))  # jitter: not all runs at once
                delay_s = min(delay_s * 2, 1.0)

    async def _eval(self, script: Script, argv: list[Any]) -> Any:
        sha, source = self._permissions.text(script)
        try:
            reply = await self._eval_text(sha, source, argv)
        except exceptions.ResponseError as error:
            self._permissions.refused(script, error)
            raise
        self._permissions.note(script)
        return reply

    async def _eval_text(self, sha: str, source: str, argv: list[Any]) -> Any:
        try:
            return await self._lanes.ask("EVALSHA", sha, 1, self.cell.prefix, *argv)
        except exceptions.NoScriptError:
            await self._lanes.ask("SCRIPT", "LOAD", source)
        try:
            return await self._lanes.ask("EVALSHA", sha, 1, self.cell.prefix, *argv)
        except exceptions.NoScriptError:  # another Redis has become the master, or they were flushed again
            return await self._lanes.ask("EVAL", source, 1, self.cell.prefix, *argv)

    async def run_on_disk(self, call: ScriptCall[T]) -> T:
        """Run a script once and wait until what it wrote is on disk; raises as `Store.run_on_disk` does."""
        if self._keeping is None:
            keeping = await self.keeping()
            keeping.check_disk()
            if keeping.can_wait_for_disk:
                _check_may_wait(
                    await self.run(lacking(commands=[WAIT_FOR_DISK[0]], keys=[""])), self.cell.url
                )
            self._keeping = keeping
        if not self._keeping.can_wait_for_disk:
            return await self.run(call)
        argv = call.argv(self.cell.common)
        return call.parse(await self.use(lambda r: self._eval_on_disk(r, call.script, argv)))

    async def _eval_on_disk(self, client: Any, script: Script, argv: list[Any]) -> Any:
        # Not on a lane: it waits for the disk, and others would wait behind it.
        reply = synced = None
        sha, source = self._permissions.text(script)
        for verb in (("EVALSHA", sha), ("EVAL", source)):
            async with client.pipeline(transaction=False) as pipe:
                pipe.execute_command(*verb, 1, self.cell.prefix, *argv)
                pipe.execute_command(*WAIT_FOR_DISK)
                reply, synced = await pipe.execute(raise_on_error=False)
            if not isinstance(reply, exceptions.NoScriptError):
                break
        if isinstance(reply, exceptions.ResponseError):
            self._permissions.refused(script, reply)
        else:
            self._permissions.note(script)
        return _known_on_disk(reply, synced, self.cell)

    async def keeping(self) -> PersistenceInfo:
        """What this Redis says of how it keeps what is written."""
        async with self.redis.pipeline(transaction=False) as pipe:

            async def ask(_: Any) -> list[Any]:
                return _answers(await ask_persistence(pipe).execute(raise_on_error=False))

            return PersistenceInfo.of(await self.ask(ask))

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """Any read: `await store.ask(lambda r: r.hgetall(key))`, errors translated.

        It is asked again when its connection broke: a read changes nothing.
        """
        with translating(self.cell.url):
            try:
                return await question(self.redis)
            except CONNECTION_LOST as error:
                if not connection_broke(error):
                    raise
                return await question(self.redis)

    async def use(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Anything else with the client, once, errors translated."""
        with translating(self.cell.url):
            return await work(self.redis)

    async def execute(self, plan: Plan[T], other: Callable[[Any], Awaitable[object]] | None = None) -> T:
        """Do what the plan says; a step that is neither a script nor a question is for `other`."""
        answer: Any = None
        with closing(plan):
            while True:
                try:
                    step = plan.send(answer)
                except StopIteration as done:
                    value: T = done.value
                    return value
                answer = await _do(self, step, other)

    def leave_closed_loops(self) -> None:
        """Close what is left of loops that are closed."""
        self._on_loops.close_closed_loops()

    async def close(self) -> None:
        """Close the connections of the running loop, and what is left of loops that are closed."""
        await self._on_loops.close()


def _do(store: Store | AsyncStore, step: Any, other: Callable[[Any], Any] | None) -> Any:
    """A step of a plan: its answer, to be awaited where the store is async."""
    if isinstance(step, ScriptCall):
        return store.run(step)
    if callable(step):
        return store.ask(step)
    assert other is not None, step
    return other(step)


def monotonic_deadline(seconds: float) -> Callable[[], bool]:
    """True once that many seconds are over."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end
