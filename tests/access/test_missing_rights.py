"""A missing right has its own error, which names it, and no write is partial."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Generator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from openagents_worker import Client
from openagents_worker.celery import task_handlers
from openagents_worker.celery.message import TaskMessage
from openagents_worker.errors import RedisNoPermission
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import AsyncClient
from openagents_worker.settings import load_settings
from openagents_worker.store.client import AsyncStore, Cell, Store
from openagents_worker.store.dead_letters import read_put_aside
from openagents_worker.store.rights import access_by_kind, smallest_cover
from openagents_worker.store.roles import ROLES, RoleName
from openagents_worker.store.scripts import Script
from openagents_worker.store.watch import awatch, watch
from tests.access.users import Guarded, acl_words, guarded
from tests.support.script_calls import call

REQUEST = {"agent_id": "a", "session_id": "s", "input_text": "Go.", "run_id": "r1"}

FENCED = (
    "ask", "commit", "delegate", "emit", "finish", "intent", "limit_settle", "limit_take", "release",
    "suspend",
)  # fmt: skip
"""The scripts that only the owner of a run may call."""


@pytest.fixture(scope="module")
def redis_of_users() -> Generator[Guarded]:
    with guarded() as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_is_refused() -> None:
    """In these tests, Redis does refuse commands."""


@pytest.fixture(autouse=True)
def empty(redis_of_users: Guarded) -> Generator[None]:
    yield
    redis_of_users.admin.flushall()
    for role in RoleName:
        redis_of_users.set_user(role)


def all_keys(admin: Any) -> dict[str, bytes]:
    return {key: admin.dump(key) for key in sorted(admin.keys("*"))}


def without(role: RoleName, word: str) -> list[str]:
    """The arguments of `ACL SETUSER` for a user with all rights of its file except this one."""
    if word.startswith("+"):
        return [f"-{word[1:]}"]
    sign = "&" if word.startswith("&") else "~"
    reset = "resetchannels" if sign == "&" else "resetkeys"
    kept = [one for one in acl_words(role)[1:] if one != word and one.lstrip("%R").startswith(sign)]
    return [reset, *kept]


GRANTED = [word for word in acl_words(RoleName.PRODUCER) if word.startswith(("+", "~", "%R~", "&"))]


@pytest.mark.share(of=6)
@pytest.mark.parametrize("word", GRANTED)
def test_a_run_is_submitted_completely_or_not_at_all(redis_of_users: Guarded, word: str) -> None:
    """Whichever right the producer lacks."""
    if "|" in word and not redis_of_users.can_tell_reading:
        pytest.skip("Redis 6 takes no single subcommand away")
    redis_of_users.set_user(RoleName.PRODUCER, *without(RoleName.PRODUCER, word))
    admin = redis_of_users.admin

    error = _error_of_submitting(redis_of_users)

    if error is None:
        assert admin.hget("oa:run:r1", "state") == "queued"
        assert admin.zscore("oa:sent:agents", "r1") is not None
        assert admin.xlen("oa:run:r1:events") == 1
        return
    assert admin.keys("oa*") == []
    assert (error.code, error.user, error.retryable) == ("redis.no_permission", "openagents-producer", False)
    assert error.command
    assert "config/acl/" in (error.hint or "")


def _error_of_submitting(redis_of_users: Guarded) -> RedisNoPermission | None:
    with Client(redis_of_users.url(RoleName.PRODUCER)) as client:
        try:
            client.submit(REQUEST)
        except RedisNoPermission as error:
            return error
    return None


def test_missing_rights_are_named_in_the_words_of_an_acl(redis_of_users: Guarded) -> None:
    redis_of_users.set_user(RoleName.PRODUCER, *without(RoleName.PRODUCER, "~oa:due"), "-xadd")
    with Client(redis_of_users.url(RoleName.PRODUCER)) as client, pytest.raises(RedisNoPermission) as caught:
        client.submit(REQUEST)
    assert {"+xadd ~oa:run:*:events", "+zadd ~oa:due"} <= set(caught.value.lacking)
    assert "lacks permissions: " in caught.value.message
    assert redis_of_users.url(RoleName.PRODUCER) not in str(caught.value)


@pytest.mark.share(of=4)
@pytest.mark.parametrize("name", sorted({n for role in ROLES.values() for n in role.scripts}))
def test_a_script_writes_nothing_when_it_lacks_a_right(redis_of_users: Guarded, name: str) -> None:
    """Each script without each of its commands, on data to which it would write."""
    admin = redis_of_users.admin
    role = RoleName.WORKER if name in ROLES[RoleName.WORKER].scripts else RoleName.OPERATOR
    with closing(Store(Cell(redis_of_users.server.url))) as store:
        for made in (call("register"), call("submit")):
            store.run(made)
        fence = store.run(call("claim")).fence
    fenced = {"fence": fence} if name in FENCED else {}
    before = all_keys(admin)
    for command in sorted({right.command for right in Script(name, {}).rights}):
        redis_of_users.set_user(role, f"-{command.lower()}")
        store = Store(Cell(redis_of_users.url(role)))
        with closing(store), pytest.raises(RedisNoPermission) as caught:
            store.run(call(name, **fenced))
        assert f"+{command.lower()}" in {words.partition(" ")[0] for words in caught.value.lacking}
        assert all_keys(admin) == before


def test_a_producer_that_may_not_wait_for_the_disk_writes_nothing(tmp_path: Path) -> None:
    """Otherwise the run would be accepted before the producer learns that it cannot be confirmed to be on
    disk."""
    strict = ("+info", "+command|info", "+config|get")
    with (
        EmbeddedRedis(tmp_path / "data") as server,
        closing(redis.Redis(port=server.port, decode_responses=True)) as admin,
    ):
        user = Guarded(server, admin)
        if user.version < (7, 2):
            pytest.skip("Redis before 7.2 has no WAITAOF")
        settings = load_settings(
            {"OPENAGENTS_REDIS_URL": user.url(RoleName.PRODUCER), "OPENAGENTS_DURABILITY": "strict"}
        )
        user.set_user(RoleName.PRODUCER, *strict)
        with Client(settings=settings) as client, pytest.raises(RedisNoPermission) as caught:
            client.submit(REQUEST)
        assert caught.value.lacking == ("+waitaof",)
        assert admin.keys("oa*") == []
        user.set_user(RoleName.PRODUCER, *strict, "+waitaof")
        with Client(settings=settings) as client:
            assert client.submit(REQUEST).id == "r1"


LOST_BY_SUBMIT = sorted({f"-{right.command.lower()}" for right in Script("submit", {}).rights})


@pytest.mark.parametrize("lost", [*LOST_BY_SUBMIT, "resetkeys", "resetchannels"])
def test_a_lost_right_does_not_interrupt_a_script(redis_of_users: Guarded, lost: str) -> None:
    """Not even the first script after the loss: a script checks its rights in the same atomic step in which
    it writes."""
    if not redis_of_users.can_tell_reading:
        pytest.skip("Redis 6 cannot be asked without being tried: the first script after it may be cut")
    admin = redis_of_users.admin
    with closing(Store(Cell(redis_of_users.url(RoleName.PRODUCER)))) as store:
        store.run(call("submit", run_id="before"))
        admin.execute_command("ACL", "SETUSER", "openagents-producer", lost)
        before = all_keys(admin)
        for run_id in ("first", "second"):
            with pytest.raises(RedisNoPermission) as caught:
                store.run(call("submit", run_id=run_id, session_id="s2"))
            assert caught.value.lacking
        assert all_keys(admin) == before
        redis_of_users.set_user(RoleName.PRODUCER)
        store.run(call("submit", run_id="after", session_id="s2"))


@pytest.mark.parametrize("name", sorted({n for role in ROLES.values() for n in role.scripts}))
def test_the_short_check_of_a_script_covers_all_its_rights(name: str) -> None:
    """Each command once, and each kind of key with the access that it needs."""
    rights = Script(name, {}).rights
    asked = smallest_cover(rights)

    assert asked <= set(rights)
    assert {right.command for right in asked} == {right.command for right in rights}
    assert access_by_kind(asked) == access_by_kind(rights)


@pytest.mark.parametrize("word", ["~agents*", "~_kombu.binding*"])
def test_a_producer_without_the_right_to_send_messages_logs_the_reason(
    redis_of_users: Guarded, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is accepted: a worker sends the message."""
    redis_of_users.set_user(RoleName.PRODUCER, *without(RoleName.PRODUCER, word))
    assert _error_of_submitting(redis_of_users) is None
    assert "redis.no_permission: config/acl/producer.acl" in caplog.text
    assert "o permissions" in caplog.text  # Redis's own words


# --- other programs --------------------------------------------------------------------------------------


async def test_an_async_producer_gets_the_same_error(redis_of_users: Guarded) -> None:
    redis_of_users.set_user(RoleName.PRODUCER, "-hset")
    async with AsyncClient(redis_of_users.url(RoleName.PRODUCER)) as client:
        with pytest.raises(RedisNoPermission) as caught:
            await client.submit(REQUEST)
    assert caught.value.command == "hset"
    assert redis_of_users.admin.keys("oa*") == []


@pytest.mark.parametrize(
    ("words", "command", "key"),
    [
        (["-hmget"], "hmget", "oa:run:r1"),
        (["resetkeys"], "hmget", "oa:run:r1"),
        (["-xrange"], "xrange", "oa:run:r1:events"),
        (["resetchannels"], "subscribe", "oa:events:a:s:r1"),
    ],
)
def test_a_watcher_gets_an_error_for_what_it_may_not_read(
    redis_of_users: Guarded, words: list[str], command: str, key: str
) -> None:
    """Before it waits for anything; the same with the sync and the async client."""
    with Client(redis_of_users.url(RoleName.PRODUCER)) as client:
        client.submit(REQUEST)
    redis_of_users.set_user(RoleName.WATCHER, *words)

    with Client(redis_of_users.url(RoleName.WATCHER)) as watcher, pytest.raises(RedisNoPermission) as caught:
        list(watch(watcher.store, "r1"))
    assert (caught.value.command, caught.value.key) == (command, key)

    async def watched() -> None:
        async with AsyncClient(redis_of_users.url(RoleName.WATCHER)) as watcher:
            async for _ in awatch(watcher.store, "r1"):
                pass

    with pytest.raises(RedisNoPermission) as caught:
        asyncio.run(watched())
    assert (caught.value.command, caught.value.key) == (command, key)


FORBIDDEN = {
    RoleName.WATCHER: (
        "SET oa:run:r1 x", "HSET oa:run:r1 state done", "DEL oa:run:r1", "XADD oa:run:r1:events * a b",
        "PUBLISH oa:events:a:s:r1 x", "EVAL return(1) 0", "KEYS *", "FLUSHALL", "CONFIG GET *", "ACL LIST",
        "LRANGE agents 0 -1", "GET another:key", "MONITOR", "CLIENT LIST", "EXPIRE oa:run:r1 1",
    ),
    RoleName.PRODUCER: (
        "KEYS *", "SCAN 0", "FLUSHALL", "FLUSHDB", "CONFIG GET *", "CONFIG SET maxmemory 1", "ACL LIST",
        "HGETALL another:key", "DEL oa:workers", "ZADD oa:workers 1 w", "HSET oa:agents a {}", "MONITOR",
        "EVAL return(redis.call('KEYS','*')) 0", "EVAL return(redis.call('DEL','oa:workers')) 0",
        "EVAL return(redis.call('HGETALL','another:key')) 0", "SHUTDOWN",
        "SUBSCRIBE another", "PUBLISH another x", "CLIENT KILL 1",
    ),
    RoleName.WORKER: (
        "KEYS *", "FLUSHALL", "FLUSHDB", "CONFIG SET maxmemory 1", "ACL LIST", "GET another:key", "MONITOR",
        "SHUTDOWN", "CLIENT KILL 1", "EVAL return(redis.call('FLUSHALL')) 0", "SWAPDB 0 1",
        "PUBLISH another x",
    ),
    RoleName.OPERATOR: ("KEYS *", "FLUSHALL", "CONFIG GET *", "GET another:key", "ACL LIST"),
    RoleName.FLOWER: (
        "KEYS *", "HGETALL oa:run:r1", "GET oa:run:r1", "PSUBSCRIBE oa:events:a:s:r1", "CONFIG GET *",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("role", "line"), [(role, line) for role in FORBIDDEN for line in FORBIDDEN[role]])
def test_a_role_cannot_do_anything_else(redis_of_users: Guarded, role: RoleName, line: str) -> None:
    if not redis_of_users.can_tell_reading and role is RoleName.PRODUCER and "oa:" in line:
        pytest.skip("Redis 6 does not tell reading from writing")
    with closing(Store(Cell(redis_of_users.url(role)))) as store, pytest.raises(RedisNoPermission) as caught:
        store.use(lambda r: r.execute_command(*line.split(" ")))
    assert caught.value.user == f"openagents-{role}"


@pytest.mark.share(of=4)
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-hset"], "+hset ~oa:"),
        (["-subscribe"], "+subscribe &oa:notices:*"),
        (without(RoleName.WORKER, "~unacked"), "~unacked"),
        (without(RoleName.WORKER, "&/0.celery.pidbox"), "&/0.celery.pidbox"),
    ],
)
def test_a_worker_does_not_start_without_its_rights(
    redis_of_users: Guarded, tmp_path: Any, words: list[str], named: str
) -> None:
    """It names the rights that its user lacks, in Redis and in the broker, before it takes a run."""
    if words == ["-subscribe"] and not redis_of_users.can_tell_reading:
        pytest.skip("Redis 6 is asked by a script, which runs no such command")
    redis_of_users.set_user(RoleName.WORKER, *words)
    agents = tmp_path / "agents.json"
    agents.write_text('{"version": "1.0", "agents": [{"id": "a", "name": "a", "llm": {"provider": "mock"}, '
                      '"memory": {"type": "buffer"}, "pattern": {"type": "react"}}]}')  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "openagents_worker.cli", "worker", "--name", "w"],
        env={
            "PATH": "/usr/bin:/bin",
            "OPENAGENTS_REDIS_URL": redis_of_users.url(RoleName.WORKER),
            "OPENAGENTS_CONFIG": str(agents),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "error: redis.no_permission: " in done.stderr
    assert named in done.stderr
    assert redis_of_users.admin.keys("*") == []


async def test_an_external_request_that_redis_refuses_is_put_aside(
    redis_of_users: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    """Its message is not in the broker any more: the request is kept completely, and occupies no slot."""
    redis_of_users.set_user(RoleName.WORKER, *without(RoleName.WORKER, "+zadd"))
    request = RunRequest(agent_id="a", session_id="s", input_text="Go." * 10_000, run_id="r1")
    message = TaskMessage("r1", [request.model_dump()], {}, "agents", ours=False)
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_of_users.url(RoleName.WORKER)})
    store = AsyncStore(Cell(redis_of_users.url(RoleName.WORKER)))
    async with AsyncExitStack() as closing_all:
        closing_all.push_async_callback(store.close)
        process: Any = SimpleNamespace(store=store, settings=settings)
        with pytest.raises(RedisNoPermission):
            await task_handlers._accept(process, request, message, "")

        [entry] = await store.execute(read_put_aside(store.keys))
        assert (entry.key, entry.code) == ("agents", "redis.no_permission")
        assert "+zadd" in entry.what
        assert json.loads(entry.item) == request.model_dump(exclude_unset=True)

        redis_of_users.set_user(RoleName.WORKER, "-zadd", "-lpush")
        with pytest.raises(RedisNoPermission):
            await task_handlers._accept(process, request, message, "")
        assert [line.getMessage().split()[0] for line in caplog.records][-1:] == ["message.not_kept"]
