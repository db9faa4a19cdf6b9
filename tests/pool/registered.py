"""A worker of the registered app `tests.pool.mixed`: a real process with a real Redis."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.pool.shopkeeper import AGENTS, ROOT, Shop, new_tag, opened

__all__ = ["worker"]


@contextmanager
def worker(
    folder: Path, url: str, queues: str, conf: Mapping[str, Any], *agents: Mapping[str, Any], **env: str
) -> Generator[Shop]:
    """A worker during the `with` block; `conf` are Celery settings of its app."""
    (folder / "agents.json").write_text(json.dumps({"agents": [*AGENTS, *agents]}))
    node, log = f"mixed{new_tag()}@test", folder / "worker.log"
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OPENAGENTS_REDIS_URL": url,
        "OPENAGENTS_CONFIG": str(folder / "agents.json"),
        "OPENAGENTS_LEASE_MS": "2000",
        "OPENAGENTS_DRAIN_TIMEOUT_S": "0.5",
        "PRODUCT_REDIS": url,
        "PRODUCT_CONF": json.dumps(conf),
        **env,
    }
    command = [sys.executable, "-m", "celery", "-A", "tests.pool.mixed", "worker", "-n", node]
    command += ["-Q", queues, "--without-gossip", "--without-mingle", "-l", "INFO"]
    with opened(url, command, variables, log, node) as shop:
        yield shop
