"""What these tests share: one Redis of each kind, all of them emptied before each test."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.tls.servers import Servers, servers_in


@pytest.fixture(scope="package")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Generator[Servers]:
    with servers_in(tmp_path_factory.mktemp("tls")) as servers:
        yield servers


@pytest.fixture
def servers(_servers: Servers) -> Servers:
    _servers.clear()
    return _servers
