"""A pattern never sees an error of the store, whatever Redis replies.

A real Redis refuses commands, or its connection breaks, at each write of a run. The pattern repeats a call
after any error, so that an error would be visible.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis_async
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunState
from openagents_worker.runtime.runner import AttemptOutcome
from tests.runtime import plugins
from tests.runtime.test_replay import open_gates, patterned, tool
from tests.support.command_proxy import Command, Proxy
from tests.support.lossy_proxy import closed_port
from tests.support.runner import Process, due, process
from tests.support.waiting import await_for

STEPS = 5
WRITES = ("claim", "emit", "commit", "suspend", "page", "finish")


class Admin:
    """A client with all rights that makes Redis refuse commands."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.redis = self._client()
        self._busy: asyncio.Task[Any] | None = None

    def _client(self) -> Any:
        return redis_async.Redis.from_url(
            self.url,
            username="admin",
            password="pw",
            single_connection_client=True,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )

    async def prepare(self) -> None:
        async with redis_async.Redis.from_url(self.url) as default:
            await default.execute_command("ACL", "SETUSER", "admin", "on", ">pw", "~*", "&*", "+@all")
            await default.flushall()
        await self.redis.initialize()

    async def config(self, **values: str | int) -> None:
        for name, value in values.items():
            await self.redis.config_set(name.replace("_", "-"), value)

    async def spin(self) -> None:
        """A script that runs until it is killed."""

        async def run() -> None:
            async with self._client() as other:
                with pytest.raises(exceptions.ResponseError):
                    await other.eval("while true do end", 0)

        self._busy = asyncio.create_task(run(), name="spin")
        await await_for(self._is_busy, "Redis is busy with a script")

    async def _is_busy(self) -> bool:
        try:
            await self.redis.ping()
        except exceptions.ResponseError:
            return True
        return False

    async def kill_script(self) -> None:
        await self.redis.script_kill()
        assert self._busy is not None
        await self._busy

    async def fail_to_save(self) -> None:
        (self.folder / "dump.rdb").mkdir(exist_ok=True)
        await self.config(save="3600 1000000", stop_writes_on_bgsave_error="yes")
        await self.redis.bgsave()
        await await_for(self._save_failed, "the snapshot has failed")

    async def _save_failed(self) -> bool:
        status = await self.redis.info("persistence")
        return bool(status["rdb_last_bgsave_status"] == "err" and not status["rdb_bgsave_in_progress"])

    async def close(self) -> None:
        await self.redis.aclose()


Act = Callable[[Admin], Awaitable[Any]]


async def nothing(_: Admin) -> None:
    pass


def command(*words: str | int) -> Act:
    return lambda admin: admin.redis.execute_command(*words)


def setting(**values: str | int) -> Act:
    return lambda admin: admin.config(**values)


async def leave_master(admin: Admin) -> None:
    await admin.redis.execute_command("REPLICAOF", "127.0.0.1", closed_port())


async def leave_master_and_be_silent(admin: Admin) -> None:
    await admin.config(replica_serve_stale_data="no")
    await leave_master(admin)


async def be_master(admin: Admin) -> None:
    await admin.redis.execute_command("REPLICAOF", "NO", "ONE")
    await admin.config(replica_serve_stale_data="yes")


REAL: dict[str, tuple[Act, Act]] = {
    "NOSCRIPT": (command("SCRIPT", "FLUSH"), nothing),
    "OOM": (setting(maxmemory=1), setting(maxmemory=0)),
    "NOREPLICAS": (setting(min_replicas_to_write=1), setting(min_replicas_to_write=0)),
    "READONLY": (leave_master, be_master),
    "MASTERDOWN": (leave_master_and_be_silent, be_master),
    "BUSY": (Admin.spin, Admin.kill_script),
    "MISCONF": (Admin.fail_to_save, setting(stop_writes_on_bgsave_error="no")),
}
FORGED = (
    "LOADING Redis is loading the dataset in memory",
    "CLUSTERDOWN The cluster is down",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "EXECABORT Transaction discarded because of previous errors.",
    "ERR Error running script (call to f_1): @user_script:1: -OOM command not allowed",
)
LINES = ("lost before", "lost after", "max clients")
MOST_ATTEMPTS = 50  # far more than a run needs; a run that no attempt moves would be executed for ever
FINAL = (
    "WRONGTYPE Operation against a key holding the wrong kind of value script: 1, on @user_script:7.",
    "ERR user_script:7: Script attempted to access nonexistent global variable 'oops'",
)


class Fault:
    """A fault at the first command of this name. The repetition succeeds."""

    def __init__(self, admin: Admin, at: str, kind: str) -> None:
        self.admin, self.at, self.kind = admin, at, kind
        self.met = 0
        self.over = False
        self._lifting: asyncio.Task[None] | None = None

    async def before(self, command: Command) -> bool | str:
        if command.name != self.at:
            if self.met and not self.over:
                await self._end()
            return False
        self.met += 1
        if self.met > 1:
            return await self._again()
        if self.kind in REAL:
            await REAL[self.kind][0](self.admin)
        elif self.kind == "NOPERM":
            await self.admin.redis.execute_command("ACL", "SETUSER", "default", "-evalsha", "-eval")
        elif self.kind == "max clients":
            await self.admin.config(maxclients=1)
            self._lifting = asyncio.create_task(self._let_in(), name="let in")
        elif self.kind in (*FORGED, *FINAL):
            return self.kind
        return self.kind in ("lost before", "max clients")

    async def after(self, command: Command) -> bool:
        return command.name == self.at and self.kind == "lost after" and self.met == 1

    async def _again(self) -> bool | str:
        if self.kind in FORGED and self.met == 2:
            return self.kind
        await self._end()
        return False

    async def _end(self) -> None:
        if self.met and not self.over:
            self.over = True
            if self.kind in REAL:
                await REAL[self.kind][1](self.admin)
            elif self.kind == "NOPERM":
                await self.admin.redis.execute_command("ACL", "SETUSER", "default", "+evalsha", "+eval")

    async def _let_in(self) -> None:
        async def refused() -> bool:
            return bool((await self.admin.redis.info("stats"))["rejected_connections"] > 0)

        await await_for(refused, "a connection is refused")
        await self.admin.config(maxclients=1000)

    async def close(self) -> None:
        await self._end()
        if self._lifting is not None:
            await self._lifting


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("redis")
    with EmbeddedRedis(folder, extra={"lua-time-limit": "20"}) as server:
        yield server, folder
        with suppress(FileNotFoundError):
            (folder / "dump.rdb").rmdir()  # otherwise Redis cannot save and does not exit


@asynccontextmanager
async def shop_with(server: Any, at: str, kind: str) -> AsyncIterator[tuple[Process, Fault]]:
    redis, folder = server
    admin = Admin(redis.url, folder)
    await admin.prepare()
    fault, loop = Fault(admin, at, kind), asyncio.get_running_loop()

    def here(verdict: Callable[[Command], Awaitable[bool | str]]) -> Any:
        async def ask(command: Command) -> bool | str:
            asked = asyncio.run_coroutine_threadsafe(_awaited(verdict(command)), loop)
            return await asyncio.wrap_future(asked)

        return ask

    proxy = Proxy(redis.url)
    await asyncio.to_thread(proxy.__enter__)
    try:
        url = await asyncio.to_thread(proxy.url_of, "w")
        async with process(url, patterned("Persistent", tool("Bulky"), n=STEPS)) as shop:
            proxy.count(before=here(lambda c: fault.before(c)), after=here(fault.after))
            yield shop, fault
            proxy.count()
    finally:
        await asyncio.to_thread(proxy.__exit__)
        await fault.close()
        await admin.close()


async def _awaited(work: Awaitable[bool | str]) -> bool | str:
    return await work


async def execute_to_end(shop: Process, fault: Fault) -> None:
    """Execute the run until it ends.

    One call is slow, so that its events are stored earlier; one is retried.
    """
    plugins.FAILURES[str(STEPS - 1)] = [plugins.rate_limited(1)]
    open_gates(*(f"charge-{n}" for n in range(STEPS) if n != 1))
    await shop.submit()
    for _ in range(MOST_ATTEMPTS):
        if (record := await shop.record()).state.is_terminal:
            return
        executing = asyncio.create_task(shop.execute(), name="carry")
        opening = asyncio.create_task(_open_after_events(shop, fault.admin), name="open")
        await executing
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)  # the run may have ended
        if (await shop.record()).state is RunState.RETRYING:
            await due(shop)
    pytest.fail(f"after {MOST_ATTEMPTS} attempts the run has not ended: {record}")


async def _open_after_events(shop: Process, admin: Admin) -> None:
    async def events_are_stored() -> bool:
        with suppress(exceptions.RedisError):
            stored = [str(fields) for _, fields in await admin.redis.xrange(shop.store.keys("events", "r1"))]
            return any("tool.called" in fields and "charge-1" in fields for fields in stored)
        return False

    try:
        await await_for(events_are_stored, "the second call's events are stored")
    finally:
        plugins.GATES["charge-1"].set()  # without it the run would wait for ever


def seen() -> list[list[int]]:
    """The numbers that the pattern reached, one list per attempt."""
    attempts: list[list[int]] = []
    for entry in plugins.LOG:
        if entry[0] == "seen":
            attempts += [[]] if entry[1] == 0 else []
            attempts[-1].append(entry[1])
    return attempts


def caught() -> list[Any]:
    return [entry for entry in plugins.LOG if entry[0] == "caught"]


ALL = list(range(STEPS))


@pytest.mark.share(of=5)
@pytest.mark.parametrize("at", WRITES)
@pytest.mark.parametrize("kind", [*REAL, *FORGED, *LINES])
@pytest.mark.defect("D14")
async def test_a_temporary_fault_is_waited_for(server: Any, at: str, kind: str) -> None:
    """The write is repeated until Redis accepts it. The pattern sees the same calls as without the fault."""
    async with shop_with(server, at, kind) as (shop, fault):
        await execute_to_end(shop, fault)

        assert fault.met >= 1
        assert caught() == []
        assert seen() == [ALL, ALL]
        assert plugins.executed("charge") == ALL
        record = await shop.record()
        assert (record.state, record.recoveries) == (RunState.COMPLETED, 0)


@pytest.mark.parametrize("at", WRITES)
@pytest.mark.parametrize("kind", ["NOPERM", *FINAL])
async def test_a_permanent_error_releases_the_run(server: Any, at: str, kind: str) -> None:
    """The run continues from its last checkpoint. Neither pattern nor journal contain the error."""
    async with shop_with(server, at, kind) as (shop, fault):
        await execute_to_end(shop, fault)

        assert fault.met >= 1
        assert caught() == []
        assert all(attempt == ALL[: len(attempt)] for attempt in seen())
        assert seen()[-1] == ALL
        assert sorted(set(plugins.executed("charge"))) == ALL
        assert len(plugins.executed("charge")) <= STEPS + 1  # one more for the refused record
        assert (await shop.record()).state is RunState.COMPLETED
        recorded = [entry for entry in await shop.journal() if entry.get("kind") == "tool"]
        assert len(recorded) == STEPS
        assert all("ok" in entry["outcome"] for entry in recorded)


async def test_a_run_whose_write_is_refused_is_released_at_once(server: Any) -> None:
    """It is released without waiting for the heartbeat, with a wake-up."""
    async with shop_with(server, "commit", FINAL[0]) as (shop, _):
        open_gates(*(f"charge-{n}" for n in range(STEPS)))
        await shop.submit()

        attempt_result = await shop.execute()

        assert attempt_result.kind is AttemptOutcome.SKIPPED
        record = await shop.record()
        assert (record.state, record.worker) == (RunState.QUEUED, None)
        assert [wake.run_id for wake in shop.wakes] == ["r1"]


async def test_a_release_that_is_refused_is_left_to_the_heartbeat(server: Any) -> None:
    """The worker still owns the run, until it may write again or its lease ends."""
    async with shop_with(server, "commit", FINAL[0]) as (shop, fault):
        before, fault.kind = fault.before, FINAL[0]

        async def refused(command: Command) -> bool | str:
            return FINAL[0] if command.name in ("commit", "release") else await before(command)

        fault.before = refused  # type: ignore[method-assign]
        open_gates(*(f"charge-{n}" for n in range(STEPS)))
        await shop.submit()

        attempt_result = await shop.execute()

        assert attempt_result.kind is AttemptOutcome.SKIPPED
        assert (await shop.record()).state is RunState.RUNNING
        assert (shop.runner.known(), caught()) == (frozenset(), [])


@pytest.mark.parametrize("kind", FORGED)
async def test_a_fault_that_outlasts_the_lease_stops_the_attempt(server: Any, kind: str) -> None:
    """The next worker finds the journal unchanged, and the pattern has not seen the fault."""
    async with shop_with(server, "commit", kind) as (shop, fault):

        async def until_the_lease_ends(command: Command) -> bool | str:
            fault.met += command.name == "commit"
            shop.lease.left_s = 0.0 if fault.met == 3 else shop.lease.left_s
            return kind if command.name == "commit" else False

        fault.before = until_the_lease_ends  # type: ignore[method-assign]
        open_gates(*(f"charge-{n}" for n in range(STEPS)))
        await shop.submit()

        attempt_result = await shop.execute()

        assert (attempt_result.kind, attempt_result.reason) == (AttemptOutcome.SKIPPED, "fenced")
        assert (seen(), caught()) == ([[0]], [])
        assert await shop.journal() == []
        assert (await shop.record()).state is RunState.RUNNING  # until its lease ends in Redis
