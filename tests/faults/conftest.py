"""Fixtures of the fault tests: a world that ends with the test."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.models import RunRecord
from tests.support.supervised_deployment import World

MakeWorld = Callable[..., World]
TIMES = {"ttft_ms", "llm_latency_p50_ms", "llm_latency_p95_ms", "llm_retry_count"}
"""Fields of a usage that are different in each run."""


def runs_below(world: World, run_id: str) -> list[RunRecord]:
    """The children of a run, each with all below it."""
    below: list[RunRecord] = []
    for child in world.client.runs(parent_run_id=run_id, limit=1_000).items:
        below += [child, *runs_below(world, child.run_id)]
    return below


@pytest.fixture
def make_world(tmp_path: Path) -> Generator[MakeWorld]:
    """Creates a world whose workers are not started yet; all end with the test."""
    with ExitStack() as held:

        def make(**options: Any) -> World:
            return held.enter_context(World(tmp_path, **options))

        yield make
