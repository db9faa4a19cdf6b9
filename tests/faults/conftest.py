"""Fixtures of the fault tests: a world that ends with the test."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.models import RunRecord
from tests.support.command_proxy import Command, Proxy
from tests.support.supervised_deployment import World

MakeWorld = Callable[..., World]
TIMES = {"ttft_ms", "llm_latency_p50_ms", "llm_latency_p95_ms", "llm_retry_count"}
"""Fields of a usage that are different in each run."""


def strike_at(world: World, proxy: Proxy, fault: str, at: int | str, nth: int = 1) -> list[Command]:
    """Let the fault happen once, at the `nth` command of that number or name. Returns a list that gets it.

    `killed before`, `killed after`: the worker dies before or after the command. `answer lost`: its answer.
    """
    met: list[Command] = []
    left = itertools.count(nth - 1, -1)

    async def strike(command: Command) -> bool:
        if at not in (command.number, command.name) or met or next(left):
            return False
        met.append(command)
        if fault != "answer lost":
            await asyncio.to_thread(world.kill, world.worker(command.worker))
        return True

    proxy.count(**{"before" if fault == "killed before" else "after": strike})
    return met


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
