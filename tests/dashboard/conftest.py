from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.dashboard.server import Server, serving
from tests.runtime import plugins


@pytest.fixture(autouse=True)
def _fresh_plugins() -> None:
    plugins.reset()


@pytest.fixture
async def server(redis_url: str) -> AsyncIterator[Server]:
    """Flower with our pages, without a password, on an empty Redis."""
    async with serving(redis_url) as server:
        yield server
