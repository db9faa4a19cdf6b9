"""Fixtures for all tests: a real Redis that is emptied before each test, and the guards of `guards.py`."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest
import redis

from openagents_worker.local.redis_server import EmbeddedRedis
from tests.hostile.table import lines_of

pytest_plugins = [
    "tests.support.guards",
    "tests.support.sampling",
    "tests.support.cpu_report",
    "tests.support.processes",
]

# The tests start hundreds of processes. Container images often disable bytecode files; then each process
# would compile everything that it imports. `make clean` removes the files.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The duration of an example depends on the load of the machine, so there is no deadline.
# `pytest --hypothesis-profile=thorough` tries ten times as many.
hypothesis.settings.register_profile("any-machine", deadline=None, max_examples=50)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile("any-machine")


SHORT = frozenset({"unit", "store", "producer", "errors", "fundamentals", "bench"})
"""Folders whose test files take only a few seconds each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long files first, so that parallel processes end together."""
    tests = Path(__file__).parent
    items.sort(
        key=lambda item: item.path.is_relative_to(tests) and item.path.relative_to(tests).parts[0] in SHORT
    )


@pytest.fixture(scope="session")
def redis_server() -> Generator[EmbeddedRedis]:
    """A Redis server for the whole test session, on a free port."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> Generator[str]:
    """The URL of an empty Redis. After the test, every key must have a TTL or be on the permanent list."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    yield redis_server.url
    from openagents_worker.store.ttl import ttl_violations

    assert ttl_violations(redis_server.url) == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape broken characters in the output of tests: pytest-xdist cannot send them between processes."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of hostile inputs and the answers to them."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    if lines := lines_of(report for report in reports if isinstance(report, pytest.TestReport)):
        terminalreporter.section("hostile input")
        terminalreporter.write_line("\n".join(lines))
