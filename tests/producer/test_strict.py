"""`OPENAGENTS_DURABILITY=strict`: an accepted run is on the disk of Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.errors import RedisUnreachable, RedisUnsafe, SubmitUnknown
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest, RunState
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AnswerLost
from openagents_worker.store.durability import PersistenceInfo
from tests.support.scripts import Hand

Submit = Callable[[EmbeddedRedis, str], None]


def strict(server: EmbeddedRedis) -> Settings:
    return load_settings(
        {"OPENAGENTS_REDIS_URL": server.url, "OPENAGENTS_DURABILITY": "strict", "OPENAGENTS_QUEUE": "agents"}
    )


def without(tmp_path: Path, *commands: str) -> dict[str, str]:
    """Options of a Redis without these commands: versions before 7.2 have no WAITAOF."""
    file = tmp_path / "without.conf"
    file.write_text("".join(f'rename-command {command} ""\n' for command in commands))
    return {"include": str(file)}


def request(run_id: str) -> RunRequest:
    return RunRequest(agent_id="assistant", session_id=run_id, input_text="hi", run_id=run_id)


def submit(server: EmbeddedRedis, run_id: str) -> None:
    """As a program without an event loop does."""
    with Client(settings=strict(server)) as client:
        client.submit(request(run_id))


def submit_on_a_loop(server: EmbeddedRedis, run_id: str) -> None:
    async def go() -> None:
        async with AsyncClient(settings=strict(server)) as client:
            await client.submit(request(run_id))

    asyncio.run(go())


both_ways = pytest.mark.parametrize("submit", [submit, submit_on_a_loop], ids=["sync", "async"])


def states(server: EmbeddedRedis, *run_ids: str) -> set[RunState]:
    with Client(settings=strict(server)) as client:
        return {client.record(run_id).state for run_id in run_ids}


def test_what_is_not_on_disk_in_time_is_not_said_to_be_accepted(tmp_path: Path) -> None:
    """The run may be accepted. When the disk works again, the same request is the same run."""
    with (
        EmbeddedRedis(tmp_path) as server,
        Hand(server.url) as hand,
        Client(settings=strict(server)) as client,
    ):
        client.submit(request("r1"))
        hand.store.redis.config_set("appendfsync", "no")
        with pytest.raises(SubmitUnknown, match="not on disk within 1500 ms"):
            client.submit(request("r2"))

        hand.store.redis.config_set("appendfsync", "everysec")
        client.submit(request("r2"))
        assert states(server, "r1", "r2") == {RunState.QUEUED}


async def test_a_loop_waits_for_the_disk_too(tmp_path: Path) -> None:
    """It continues with other work meanwhile."""
    async with EmbeddedRedis(tmp_path) as server, AsyncClient(settings=strict(server)) as client:
        with Hand(server.url) as hand:
            await client.submit(request("r1"))
            hand.store.redis.config_set("appendfsync", "no")
            with pytest.raises(SubmitUnknown, match="not on disk within 1500 ms"):
                await client.submit(request("r2"))

            hand.store.redis.config_set("appendfsync", "everysec")
            await client.submit(request("r2"))


@both_ways
@pytest.mark.parametrize(
    ("how", "sync", "unknown", "why"),
    [
        ("no", "no", [], "appendonly is off"),
        ("everysec", "no", [], "appendfsync is no"),
        ("everysec", "everysec", ["WAITAOF"], "not support WAITAOF"),
        ("always", "always", ["WAITAOF", "CONFIG"], "not support WAITAOF"),
    ],
    ids=["in memory", "never synced", "before 7.2", "before 7.2, without CONFIG"],
)
def test_a_redis_that_cannot_tell_is_refused_before_anything_is_written(
    submit: Submit, tmp_path: Path, how: Any, sync: str, unknown: list[str], why: str
) -> None:
    """The error names the missing setting; the run does not exist."""
    options = {"appendfsync": sync, **without(tmp_path, *unknown)}
    with EmbeddedRedis(tmp_path, appendonly=how, extra=options) as server, Hand(server.url) as hand:
        with pytest.raises(RedisUnsafe, match=why) as refused:
            submit(server, "r1")

        assert refused.value.code == "redis.unsafe"
        assert hand.store.redis.keys("*r1*") == []


@both_ways
def test_before_7_2_it_is_enough_that_redis_syncs_before_it_answers(submit: Submit, tmp_path: Path) -> None:
    """With `appendfsync always` there is nothing to wait for."""
    options = without(tmp_path, "WAITAOF")
    with EmbeddedRedis(tmp_path, appendonly="always", extra=options) as server, Hand(server.url):
        submit(server, "r1")

        assert states(server, "r1") == {RunState.QUEUED}


def test_a_redis_that_is_away_is_unreachable_as_ever() -> None:
    settings = load_settings(
        {"OPENAGENTS_REDIS_URL": "redis://127.0.0.1:1/0", "OPENAGENTS_DURABILITY": "strict"}
    )
    with Client(settings=settings) as client, pytest.raises(RedisUnreachable):
        client.submit(request("r1"))


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_redis_that_evicts_is_unsafe_once_its_memory_has_a_limit(policy: str) -> None:
    """A limit makes the policy bite; under noeviction a full Redis refuses writes and loses nothing."""
    evicting = PersistenceInfo(True, True, "everysec", 1_000_000, policy)
    unlimited = PersistenceInfo(True, True, "everysec", 0, policy)
    full = PersistenceInfo(True, True, "everysec", 1_000_000, "noeviction")

    with pytest.raises(RedisUnsafe, match=policy):
        evicting.check_memory()
    unlimited.check_memory()
    full.check_memory()
    assert (unlimited.may_evict, full.may_evict) == (True, False)


def test_a_master_that_is_demoted_before_the_write_is_on_disk(tmp_path: Path) -> None:
    """Nobody knows whether the new master has the run, so the caller must submit it again."""
    with EmbeddedRedis(tmp_path / "data") as server, Client(settings=strict(server)) as client:
        client.submit(request("r1"))
        client.store.redis.replicaof("127.0.0.1", "1")
        read = scripts.page(run_id="r1", position=0, page_bytes=1)  # a script that a replica executes

        with pytest.raises(AnswerLost, match="demoted to a replica"):
            client.store.run_on_disk(read)
