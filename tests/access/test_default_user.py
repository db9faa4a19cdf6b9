"""The user `default`: the rights of a worker are searched for only if somebody has restricted it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

import pytest
import redis

from openagents_worker.celery import access
from openagents_worker.celery.access import check_access
from openagents_worker.errors import RedisNoPermission
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.settings import Settings

UNRESTRICTED = "reset on nopass ~* &* +@all"


@pytest.fixture(autouse=True)
def nothing_is_refused() -> None:
    """In these tests, Redis does refuse commands."""


@pytest.fixture
def server() -> Generator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


def restrict(server: EmbeddedRedis, rule: str) -> None:
    admin: Any = redis.Redis(port=server.port)
    with closing(admin):
        admin.execute_command(f"ACL SETUSER default {UNRESTRICTED} {rule}")


def test_of_a_user_with_all_rights_no_rights_are_searched_for(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search reads all scripts, which takes longer than the rest of a start."""

    def search(*_: object) -> list[access.NeededRight]:
        raise AssertionError("searched")

    monkeypatch.setattr(access, "_rights_at_store", search)
    monkeypatch.setattr(access, "_rights_at_broker", search)

    check_access(Settings(redis_url=server.url), ["agents"])
    check_access(Settings(redis_url=server.url, broker_url=server.url), ["agents"])


@pytest.mark.parametrize(
    ("rule", "lacking"),
    [
        ("-hmget", "+hmget"),
        ("-@sortedset", "+zadd"),
        ("resetkeys ~oa ~oa:run:*", "~oa:aside"),
        ("resetchannels", "&oa:notices:*"),
        ("-acl -hmget", "+hmget"),
        ("clearselectors -@hash (+@all ~* &*)", ""),
    ],
)
def test_a_restricted_user_lacks_what_it_lacks(server: EmbeddedRedis, rule: str, lacking: str) -> None:
    restrict(server, rule)
    if not lacking:
        check_access(Settings(redis_url=server.url), ["agents"])
        return

    with pytest.raises(RedisNoPermission) as caught:
        check_access(Settings(redis_url=server.url), ["agents"])

    assert any(lacking in rule for rule in caught.value.lacking), caught.value.lacking
