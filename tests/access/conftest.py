"""The shop of the manual, where worker, producer and watcher are three users of Redis."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from openagents_worker import Client
from openagents_worker.producer.task import AgentTask
from openagents_worker.store.roles import RoleName
from tests.access.users import Guarded, UseOfCommands, guarded
from tests.fundamentals.conftest import AGENTS
from tests.support.deployment import Installation, Model, installed


@pytest.fixture(scope="package")
def redis_of_users() -> Generator[Guarded]:
    with guarded() as found:
        yield found


@pytest.fixture(scope="package")
def use(redis_of_users: Guarded) -> Generator[UseOfCommands]:
    """Records the commands that the users of all roles run in these tests."""
    with UseOfCommands(redis_of_users.server.port) as found:
        yield found


@pytest.fixture(scope="package")
def shop(
    use: UseOfCommands, redis_of_users: Guarded, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Installation]:
    """A worker process, and a producer in this process, each with its own rights."""
    urls = {role: redis_of_users.url(role) for role in RoleName}
    with installed(
        tmp_path_factory.mktemp("shop"),
        *AGENTS,
        redis_url=urls[RoleName.WORKER],
        producer_url=urls[RoleName.PRODUCER],
        admin_url=redis_of_users.server.url,
        OPENAGENTS_LEASE_MS="1000",
    ) as installation:
        yield installation


@pytest.fixture(autouse=True)
def nothing_is_refused(redis_of_users: Guarded) -> Generator[None]:
    """The file of each role has all rights that the role uses."""
    redis_of_users.admin.acl_log_reset()
    yield
    assert redis_of_users.refusals() == []


@pytest.fixture
def run_agent(shop: Installation) -> AgentTask:
    return shop.run_agent


@pytest.fixture
def client(shop: Installation) -> Client:
    return shop.client


@pytest.fixture
def model(shop: Installation) -> Model:
    return shop.model
