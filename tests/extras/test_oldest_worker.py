"""Every dependency that is declared at its lowest version, all together: a producer and a worker.

`tests/adopt/test_oldest_versions.py` does the same for the base install, where Celery is older.
"""

from __future__ import annotations

import json
import sys

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from tests.extras.environments import EXTRAS, Environments
from tests.extras.test_every_extra import PRODUCER, PROJECT
from tests.support.waiting import wait_for

NEWER = ("mcp",)
"""Extras that need newer versions of what the others share with them. `test_mcp.py` has their oldest."""

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(
        sys.version_info >= (3, 13),
        reason="pydantic 2.7, the oldest that is promised, needs Python 3.12 or older",
    ),
]


def test_a_run_is_executed_with_the_oldest_versions(environments: Environments) -> None:
    """A bound in `pyproject.toml` that is too low does not install, or fails here."""
    oldest = environments.with_oldest(*(extra for extra in EXTRAS if extra not in NEWER))
    oldest.write(PROJECT)
    with EmbeddedRedis() as redis:
        env = {"OPENAGENTS_REDIS_URL": redis.url, "OPENAGENTS_CONFIG": "agents.json"}
        with oldest.started("celery", "-A", "deploy", "worker", "-l", "INFO", **env) as worker:
            wait_for(lambda: " ready." in worker.said or not worker.left(), "the worker is ready")
            assert " ready." in worker.said, worker.said
            done = oldest.run("python", "-c", PRODUCER, **env)

    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == {"output": "391", "tools": 3, "failed": []}
