"""Sentry: its own package, as it is installed today, in a worker; only the sending is not real.

Both of its integrations are at work, as they are by default. Each failure must be reported by one of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.producer.client import Client
from tests.support.deployment import ROOT
from tests.support.json_lines import complete_lines
from tests.support.runner import agent, calls, scripted
from tests.support.waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.extras

PLUGINS = "tests.runtime.failing"
ASKS = {"order": "B2"}


def react(*replies: dict[str, Any], errors_in_a_row: int = 1) -> dict[str, Any]:
    pattern = {"type": "react", "config": {"max_tool_errors_in_a_row": errors_in_a_row}}
    return {"pattern": pattern, "llm": scripted(*replies)}


AGENTS = [
    agent("tool", tools=[{"id": "price", "impl": f"{PLUGINS}.price"}], **react(calls(("price", ASKS)))),
    agent("pattern", pattern={"impl": f"{PLUGINS}.Broken"}),
    agent("model", **react({"error": "response"})),
    agent(
        "told",
        tools=[{"id": "price", "impl": f"{PLUGINS}.price"}],
        **react(calls(("price", ASKS)), {"text": "sorry"}, errors_in_a_row=2),
    ),
]


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with everything that this one has, and `sentry-sdk`."""
    folder = tmp_path_factory.mktemp("sentry")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "sentry-sdk>=2,<3"]
    subprocess.run(install, check=True)
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(own) / "also.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    return python


@contextmanager
def worker(python: Path, redis_url: str, folder: Path, *arguments: str, **env: str) -> Generator[Path]:
    """A worker; the file of what is reported while it runs."""
    events, agents, log = folder / "events", folder / "agents.json", folder / "log"
    events.touch()
    agents.write_text(json.dumps({"agents": AGENTS}))
    given = {
        "OPENAGENTS_REDIS_URL": redis_url,
        "OPENAGENTS_CONFIG": str(agents),
        "SENTRY_EVENTS": str(events),
        **env,
    }
    command = [python, "-m", "celery", "-A", "tests.extras.sentry_shop", "worker", "-Q", "agents", "-c", "2"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, **given},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
    try:
        yield events
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        sys.stdout.write(log.read_text())


def fail(redis_url: str, *agent_ids: str) -> dict[str, str]:
    """One run of each agent, to its end; their ids."""
    with Client(redis_url) as client:
        handles = {
            each: client.submit({"agent_id": each, "session_id": each, "input_text": "hi"})
            for each in agent_ids
        }
        for handle in handles.values():
            handle.wait(PATIENCE_S)
    return {agent_id: handle.id for agent_id, handle in handles.items()}


def reported(events: Path) -> list[dict[str, Any]]:
    return complete_lines(events)


def is_the_users(event: dict[str, Any]) -> bool:
    chain = event["exception"]["values"]
    last = chain[-1]["stacktrace"]["frames"][-1]["function"]
    return ([each["type"] for each in chain], last) == (["KeyError", "ValueError"], "price_of")


@pytest.mark.parametrize("which", ["ours", "registered"])
@pytest.mark.parametrize("pool", ["", "processes", "threads"])
def test_each_failure_is_one_event_whose_exception_is_the_users(
    python: Path, redis_url: str, tmp_path: Path, which: str, pool: str
) -> None:
    """Not the wrapper of this library's, not once more by another integration, and with the task's context.

    An error of this library has no exception and is one event, too; a tool's error of which the model was
    told is none.
    """
    env = {"SENTRY_REGISTER": "1"} if which == "registered" else {}
    with worker(python, redis_url, tmp_path, *(["-P", pool] if pool else []), **env) as events:
        runs = fail(redis_url, "told", "tool", "pattern", "model")
        wait_for(lambda: len(reported(events)) >= 3, "all failures have been reported")

    by_run = {event["tags"]["celery_task_id"]: event for event in reported(events)}
    assert len(reported(events)) == len(by_run) == 3
    assert set(by_run) == {runs["tool"], runs["pattern"], runs["model"]}
    assert is_the_users(by_run[runs["tool"]])
    assert is_the_users(by_run[runs["pattern"]])
    assert "exception" not in by_run[runs["model"]]
    assert by_run[runs["model"]]["logentry"]["message"] == "run.failed %s"


def test_it_is_reported_once_where_lines_of_the_log_are_not(
    python: Path, redis_url: str, tmp_path: Path
) -> None:
    """`LoggingIntegration(event_level=None)`: then the Celery integration alone is there to report."""
    with worker(python, redis_url, tmp_path, SENTRY_LINES="0") as events:
        runs = fail(redis_url, "told", "tool", "pattern", "model")
        wait_for(lambda: len(reported(events)) >= 2, "the failures of user code have been reported")

    by_run = {event["tags"]["celery_task_id"]: event for event in reported(events)}
    assert len(reported(events)) == len(by_run) == 2
    assert set(by_run) == {runs["tool"], runs["pattern"]}
    assert all(map(is_the_users, by_run.values()))
