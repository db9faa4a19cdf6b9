"""The stores: the only place that sends commands to Redis, for synchronous callers and for asyncio."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import closing, suppress
from typing import Any, Protocol, TypeVar

import redis
import redis.asyncio as redis_async
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from openagents_worker.errors import RedisRefused, RedisUnreachable
from openagents_worker.loops import PerLoop, at_fork
from openagents_worker.store.batching import PipelineBatcher
from openagents_worker.store.cell import Cell
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.connections import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S, make_pool
from openagents_worker.store.durability import PersistenceInfo
from openagents_worker.store.keys import Keys
from openagents_worker.store.plan import Commands, Emit, EmitNext, OnDisk, Plan, PlanSteps, pipelined
from openagents_worker.store.redis_clients import AsyncRedisClient, RedisClient
from openagents_worker.store.redis_errors import AnswerLost, connection_broke, translate_errors
from openagents_worker.store.script_runs import ScriptRuns, persistence
from openagents_worker.store.scripts import ScriptCall
from openagents_worker.telemetry.signals import in_inner_span, inner_span, is_enabled

__all__ = [
    "CONNECT_TIMEOUT_S",
    "AnswerLost",
    "AsyncStore",
    "Cell",
    "OnDisk",
    "Plan",
    "Reader",
    "Store",
]

T = TypeVar("T")

IN_ANSWERS = (exceptions.ResponseError,)
"""Errors that an answer of a pipeline may contain. A plan raises them, so no step has translated them."""

ExecuteStep = Callable[[Any], object]
"""Executes a step of a plan that is not an operation of the store, and returns its answer."""
ExecuteStepAsync = Callable[[Any], Awaitable[object]]

POOL_TIMEOUT_S = 10.0  # to wait for a free connection: a thousand runs of a process may need one at once
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # between the tries of an operation; each is twice the last one
MAX_CONNECTIONS = 32  # Redis executes commands in one thread: more connections do not make it faster


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
        pool = make_pool(
            redis.BlockingConnectionPool,
            cell,
            Retry(NoBackoff(), 0),
            max_connections=max_connections,
            answer_timeout_s=answer_timeout_s,
            connect_timeout_s=connect_timeout_s,
        )
        self.redis = RedisClient(connection_pool=pool)
        self._scripts = ScriptRuns(cell)
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
        with inner_span(*call.script.signal), translate_errors(self.cell.url):
            try:
                reply = self.send(*self._scripts.command(call))
            except exceptions.ResponseError as error:
                return self.execute(self._scripts.after_error(call, error))
            return self._scripts.result(call, reply)

    def send(self, *command: Any) -> Any:
        """Send one command once. Raises the exceptions of redis-py."""
        return self.redis.execute_command(*command)

    def run_on_disk(self, call: ScriptCall[T]) -> T:
        """Run a script once and wait until its writes are on disk.

        Raises the errors of `run`; `AnswerLost` also if Redis does not confirm the write in time. Raises
        `RedisUnsafe` before the script runs if this Redis cannot confirm writes at all.
        """
        return self.execute(self._scripts.run_on_disk(call))

    def persistence_info(self) -> PersistenceInfo:
        """Read the persistence settings of this Redis."""
        return self.execute(persistence(self.cell))

    def ask(self, question: Callable[[Any], T]) -> T:
        """Read with the redis-py client: `store.ask(lambda r: r.hgetall(key))`.

        Repeats the read once if its connection broke, so the function must not write. Raises
        `RedisUnreachable` and its subclasses.
        """
        try:
            return self.use(question)
        except RedisUnreachable as error:
            if not connection_broke(error.__cause__):
                raise
        return self.use(question)

    def use(self, work: Callable[[Any], T]) -> T:
        """Call a function once with the redis-py client, and translate its errors. It may write."""
        with translate_errors(self.cell.url):
            return work(self.redis)

    def execute(self, plan: Plan[T], execute_other: ExecuteStep | None = None) -> T:
        """Execute the steps of a plan. An error of a step is raised in the plan, which may handle it.

        `execute_other` gets the steps that are not operations of the store.
        """
        with translate_errors(self.cell.url, IN_ANSWERS), closing(plan):
            steps = PlanSteps(plan, self.cell.codec)
            for step in steps:
                with steps:
                    steps.answer = _execute_step(self, step, execute_other)
            return steps.result

    def stream(self, plan: Plan[None], execute_other: ExecuteStep | None = None) -> Generator[Any]:
        """Execute the steps of a plan, as `execute` does, and yield the items (`Emit`, `EmitNext`)."""
        with translate_errors(self.cell.url, IN_ANSWERS), closing(plan):
            steps = PlanSteps(plan, self.cell.codec)
            for step in steps:
                if not isinstance(step, Emit):
                    with steps:
                        steps.answer = _execute_step(self, step, execute_other)
                yield from steps.items

    def close(self) -> None:
        self.redis.close()
        self.redis.connection_pool.disconnect()


class Reader(Protocol):
    """The part of `AsyncStore` that readers need. The runtime passes an object that adds its own checks."""

    @property
    def keys(self) -> Keys: ...

    @property
    def codec(self) -> PayloadCodec: ...

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T: ...


class _ConnectionsOfLoop:
    """The client and the connections of an async store on one event loop."""

    def __init__(self, pool: Any, answer_timeout_s: float | None) -> None:
        self.redis = AsyncRedisClient(connection_pool=pool)
        self.batcher = PipelineBatcher(pool, answer_timeout_s=answer_timeout_s)
        self.first_runs: dict[str, asyncio.Future[None]] = {}
        """The first runs of scripts that are in progress, by SHA-1."""
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
        self._on_loops: PerLoop[_ConnectionsOfLoop] = PerLoop(self._connect)
        self._scripts = ScriptRuns(cell)
        self._sleep = sleep

    def _make_pool(self) -> Any:
        return make_pool(
            redis_async.BlockingConnectionPool,
            self.cell,
            AsyncRetry(NoBackoff(), 0),
            max_connections=self._max_connections,
            answer_timeout_s=self._answer_timeout_s,
            pool_timeout_s=POOL_TIMEOUT_S,
        )

    def _connect(self) -> _ConnectionsOfLoop:
        unused, self._unused_pool = self._unused_pool, None
        return _ConnectionsOfLoop(unused or self._make_pool(), self._answer_timeout_s)

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

    @property
    def codec(self) -> PayloadCodec:
        return self.cell.codec

    def run(self, call: ScriptCall[T]) -> Coroutine[Any, Any, T]:
        """As `Store.run`."""
        run = self._run if call.script.sha in self._scripts.checked else self._check_and_run
        return in_inner_span(run(call), *call.script.signal) if is_enabled() else run(call)

    async def _check_and_run(self, call: ScriptCall[T]) -> T:
        """Run a script whose rights were not checked yet. Runs of it that begin meanwhile wait for the end.

        In a worker that starts with a hundred runs, the check costs more than the script.
        """
        sha, first_runs = call.script.sha, self._on_loops.here().first_runs
        if (first_run := first_runs.get(sha)) is not None:
            await asyncio.wait([first_run])
            return await self._run(call)
        first_run = first_runs[sha] = asyncio.get_running_loop().create_future()
        try:
            return await self._run(call)
        finally:
            del first_runs[sha]
            first_run.set_result(None)

    async def _run(self, call: ScriptCall[T]) -> T:
        try:
            reply = await self._on_loops.here().batcher.execute(*self._scripts.command(call))
        except Exception as error:
            with translate_errors(self.cell.url):
                if isinstance(error, exceptions.ResponseError):
                    return await self.execute(self._scripts.after_error(call, error))
                raise
        return self._scripts.result(call, reply)

    def send(self, *command: Any) -> Awaitable[Any]:
        """As `Store.send`. The command may share its round trip with others."""
        return self._batcher.execute(*command)

    async def run_until(self, call: ScriptCall[T], until: Callable[[], bool], *, on_disk: bool = False) -> T:
        """Run a script, and repeat it while Redis is unreachable, until `until()` returns True.

        With `on_disk` its writes are on disk, see `Store.run_on_disk`.
        """
        pauses: _Pauses | None = None
        while True:
            try:
                return await (self.run_on_disk(call) if on_disk else self.run(call))
            except RedisUnreachable as error:
                pauses = pauses or _Pauses(self._sleep, until)
                await pauses.after(error)

    async def ask_until(self, question: Callable[[Any], Awaitable[T]], until: Callable[[], bool]) -> T:
        """As `ask`, but repeats the read while Redis is unreachable, until `until()` returns True."""
        pauses: _Pauses | None = None
        while True:
            try:
                return await self.ask(question)
            except RedisUnreachable as error:
                pauses = pauses or _Pauses(self._sleep, until)
                await pauses.after(error)

    def run_on_disk(self, call: ScriptCall[T]) -> Awaitable[T]:
        """As `Store.run_on_disk`. It does not use the batcher: others would wait for the disk, too."""
        return self.execute(self._scripts.run_on_disk(call))

    def persistence_info(self) -> Awaitable[PersistenceInfo]:
        """Read the persistence settings of this Redis."""
        return self.execute(persistence(self.cell))

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """As `Store.ask`: `await store.ask(lambda r: r.hgetall(key))`."""
        try:
            return await self.use(question)
        except RedisUnreachable as error:
            if not connection_broke(error.__cause__):
                raise
        return await self.use(question)

    async def use(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """As `Store.use`."""
        with translate_errors(self.cell.url):
            return await work(self.redis)

    async def execute(self, plan: Plan[T], execute_other: ExecuteStepAsync | None = None) -> T:
        """As `Store.execute`."""
        with translate_errors(self.cell.url, IN_ANSWERS), closing(plan):
            steps = PlanSteps(plan, self.cell.codec)
            for step in steps:
                with steps:
                    steps.answer = await _execute_step(self, step, execute_other)
            return steps.result

    async def stream(
        self, plan: Plan[None], execute_other: ExecuteStepAsync | None = None
    ) -> AsyncGenerator[Any]:
        """As `Store.stream`."""
        with translate_errors(self.cell.url, IN_ANSWERS), closing(plan):
            steps = PlanSteps(plan, self.cell.codec)
            for step in steps:
                if not isinstance(step, Emit):
                    with steps:
                        steps.answer = await _execute_step(self, step, execute_other)
                for item in steps.items:
                    yield item

    def leave_closed_loops(self) -> None:
        """Close the connections of event loops that are closed."""
        self._on_loops.close_closed_loops()

    async def close(self) -> None:
        """Close the connections of the running event loop, and those of event loops that are closed."""
        await self._on_loops.close()


class _Pauses:
    """The pauses between the tries of an operation while Redis is unreachable."""

    __slots__ = ("_delay_s", "_sleep", "_until")

    def __init__(self, sleep: Callable[[float], Awaitable[None]], until: Callable[[], bool]) -> None:
        self._sleep = sleep
        self._until = until
        self._delay_s = FIRST_PAUSE_S

    async def after(self, error: RedisUnreachable) -> None:
        """Wait before the next try. Raises the error if there must not be one."""
        if isinstance(error, RedisRefused) or self._until():  # Redis would refuse it again
            raise error
        # With jitter: runs must not retry at the same time.
        await self._sleep(self._delay_s * (0.5 + random.random()))
        self._delay_s = min(self._delay_s * 2, LONGEST_PAUSE_S)


def _execute_step(store: Store | AsyncStore, step: Any, execute_other: Callable[[Any], Any] | None) -> Any:
    """The answer to one step of a plan; for an async store, an awaitable of it."""
    if isinstance(step, EmitNext):  # first: a watcher executes one for each event
        assert execute_other is not None, step
        return execute_other(step)
    if isinstance(step, ScriptCall):
        return store.run(step)
    if isinstance(step, OnDisk):
        return store.run_on_disk(step.call)
    if isinstance(step, Commands):
        return store.use(pipelined(step))
    if isinstance(step, tuple):
        return store.send(*step)
    if callable(step):
        return store.ask(step)
    assert execute_other is not None, step
    return execute_other(step)
