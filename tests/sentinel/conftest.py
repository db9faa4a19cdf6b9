"""What these tests share: one Redis that sentinels watch. Each test leaves it with a master and a replica."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.sentinel.watched import Watched


@pytest.fixture(scope="package")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Generator[Watched]:
    with Watched(tmp_path_factory.mktemp("sentinel")) as watched:
        yield watched
