from __future__ import annotations

import pytest

from tests.runtime import plugins


@pytest.fixture(autouse=True)
def _fresh_plugins() -> None:
    plugins.reset()
