"""A shop with its own Redis, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from tests.pool.shopkeeper import Shop, open_shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Generator[Shop]:
    """Its worker is started with the module's `ARGUMENTS`."""
    arguments = getattr(request.module, "ARGUMENTS", ())
    with (
        EmbeddedRedis() as server,
        open_shop(tmp_path_factory.mktemp("shop"), server.url, *arguments) as shop,
    ):
        yield shop
