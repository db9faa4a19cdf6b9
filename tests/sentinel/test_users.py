"""Sentinels and a Redis whose users have the rights that `config/acl/` gives them, and no more."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from openagents_worker import Client
from openagents_worker.redis_url import Sentinels
from openagents_worker.store.roles import RoleName
from tests.access.users import ACL, PASSWORD, Guarded, guarded
from tests.sentinel.watched import MASTER, SENTINEL_PASSWORD, Server
from tests.support.deployment import agent, installed

pytestmark = pytest.mark.long

USER_OF_SENTINELS = (ACL / "sentinel.acl").read_text().replace("REPLACE-THIS-PASSWORD", PASSWORD)


@pytest.fixture
def redis_of_users() -> Generator[Guarded]:
    with guarded() as found:
        yield found


def test_a_run_is_executed_by_users_with_least_rights(redis_of_users: Guarded, tmp_path: Path) -> None:
    """Worker and producer log in at the sentinel with one user, at the master with those of their roles."""
    lines = [f"sentinel monitor {MASTER} 127.0.0.1 {redis_of_users.server.port} 1", USER_OF_SENTINELS]
    with closing(Server(tmp_path, "sentinel", SENTINEL_PASSWORD, lines, "--sentinel")) as server:
        found = Sentinels(
            (("127.0.0.1", server.port),),
            MASTER,
            sentinel_username="openagents-sentinel",
            sentinel_password=PASSWORD,
        )
        urls = {
            role: replace(found, username=f"openagents-{role}", password=PASSWORD).url for role in RoleName
        }
        redis_of_users.admin.acl_log_reset()
        with installed(
            tmp_path,
            agent("clerk"),
            redis_url=urls[RoleName.WORKER],
            producer_url=urls[RoleName.PRODUCER],
            admin_url=redis_of_users.server.url,
        ) as installation:
            handle = installation.run_agent.delay(
                {"agent_id": "clerk", "session_id": "s", "input_text": "Hi."}
            )
            handle.wait(timeout=60)
            with Client(urls[RoleName.WATCHER]) as watcher:
                names = [event.name for event in watcher.handle(handle.id).events()]

        assert names[-1] == "session.run.completed"
        refused = server.client.execute_command("ACL", "LOG")
        assert redis_of_users.refusals() == []
        assert [entry for entry in refused if "client|setinfo" not in str(entry)] == []
