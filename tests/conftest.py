"""What tests share: a real Redis, emptied before each test that uses it, and the guards of `guards.py`."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest
import redis

from openagents_worker.store.embedded import EmbeddedRedis
from tests.hostile.table import beyond_a_sample, lines_of

pytest_plugins = ["tests.guards"]

# Some hundred processes are started by the tests, each of which would compile all that it imports where an
# image of a container says that nothing is to be written. `make clean` removes what is.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# How long an example takes says more of the machine's other work than of ours.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")


SHORT = frozenset({"unit", "store", "producer", "errors", "fundamentals", "bench"})
"""Folders whose files take few seconds each."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that take long come first: at the end no process waits long for the other.

    Of the inputs in `tests/hostile` a run of all tests takes some of each kind and door; `make hostile` takes
    them all.
    """
    tests = Path(__file__).parent
    if not any("hostile" in argument for argument in config.args):
        left_out = beyond_a_sample(items)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    items.sort(
        key=lambda item: item.path.is_relative_to(tests) and item.path.relative_to(tests).parts[0] in SHORT
    )


@pytest.fixture(scope="session")
def redis_server() -> Generator[EmbeddedRedis]:
    """A Redis server for the whole session, on a port of its own."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> Generator[str]:
    """The URL of an empty Redis. Afterwards every key in it must have a TTL or be a permanent one."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    yield redis_server.url
    from openagents_worker.store.keys import ttl_violations

    assert ttl_violations(redis_server.url) == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test has printed or logged may hold half a character; processes cannot send it to each other."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was tried of hostile input, and how it was answered."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    if lines := lines_of(report for report in reports if isinstance(report, pytest.TestReport)):
        terminalreporter.section("hostile input")
        terminalreporter.write_line("\n".join(lines))
