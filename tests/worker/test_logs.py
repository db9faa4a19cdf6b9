"""The log of a real worker: with JSON every line is an object, whatever library wrote it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, platforms

from openagents_worker.celery.superuser import log_superuser
from openagents_worker.producer.client import Client
from openagents_worker.testing.model_server import ModelServer
from tests.runtime.failing import SECRET
from tests.support.waiting import PATIENCE_S, wait_for

REPLIES = [
    {"error": "rate_limit", "retry_after_ms": 1},
    {"tool_calls": [{"name": "noise_elsewhere", "arguments": {"order": "B2"}}]},
    {"tool_calls": [{"name": "noise", "arguments": {"order": "B2"}}]},
]
OF_AN_APP = ["-A", "tests.worker.noisy", "worker", "-Q", "agents"]
APPS = {"ours": ["-A", "tasks", "worker"], "registered": OF_AN_APP, "registered, with its own log": OF_AN_APP}


@contextmanager
def worker(which: str, redis_url: str, tmp_path: Path, **env: str) -> Generator[Path]:
    """A worker that writes to the file; it is stopped with SIGTERM."""
    log, agents = tmp_path / "log", tmp_path / "agents.json"
    with ModelServer(REPLIES).serve_in_thread() as model:
        react = {"type": "react", "config": {"max_tool_errors_in_a_row": 1}}
        llm = {"provider": "openai_compatible", "model": "m", "api_base": model.url}
        noisy = {"id": "noisy", "name": "Noisy", "pattern": react, "memory": {"type": "buffer"}, "llm": llm}
        tools = [{"id": name, "impl": f"tests.worker.noisy.{name}"} for name in ("noise", "noise_elsewhere")]
        agents.write_text(json.dumps({"agents": [{**noisy, "tools": tools}]}))
        variables = {"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_CONFIG": str(agents), **env}
        variables |= {"NOISY_REGISTER": "1"} if which.startswith("registered") else {}
        variables |= {"NOISY_LOG": "1"} if which.endswith("its own log") else {}
        command = [sys.executable, "-m", "celery", *APPS[which], "-c", "2", "-l", "INFO"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield log
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()


def fail_once(redis_url: str, log: Path) -> None:
    """Execute one run that fails because of its tool; returns when the worker has logged it."""
    with Client(redis_url) as client:
        result = client.submit({"agent_id": "noisy", "session_id": "s1", "input_text": "hi"}).wait(PATIENCE_S)
    assert result.error_details is not None, result
    wait_for(lambda: "run.failed" in log.read_text(), "the failed run is in the log")


@pytest.mark.share(of=3)
@pytest.mark.parametrize("which", APPS)
def test_in_json_every_line_is_an_object(which: str, redis_url: str, tmp_path: Path) -> None:
    """Also lines of Celery, billiard, warnings, print and threads; a traceback is a field."""
    with worker(which, redis_url, tmp_path, OPENAGENTS_LOG_FORMAT="json") as log:
        fail_once(redis_url, log)

    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    events = [line["event"] for line in lines]
    loggers = {line["logger"] for line in lines}
    assert {
        "celery.worker.strategy", "kombu", "multiprocessing", "py.warnings", "shop",
        "shop.tasks", "shop.orders", "celery.worker.consumer.connection",
    } <= loggers  # fmt: skip
    parts = {"printed", "B2"} <= set(events)  # Celery writes one line for each part that print() writes
    assert parts or "printed B2" in events
    assert "two\nlines of B2" in events
    assert {"printed elsewhere B2", "a line of another process"} <= set(events)
    assert "%d of them ('not a number',)" in events
    of_thread = next(line for line in lines if line["event"] == "thread.failed")
    assert "in price_of" in of_thread["exception"]
    (failed,) = [line for line in lines if line["event"] == "run.failed"]
    assert failed["level"] == "error"
    assert (failed["agent_id"], failed["session_id"], failed["code"]) == ("noisy", "s1", "tool.error")
    assert "in price_of" in failed["exception"]
    assert "openagents_worker/" not in failed["exception"]
    assert SECRET not in log.read_text()


def test_in_text_every_line_is_one_line(redis_url: str, tmp_path: Path) -> None:
    """A model call that is retried is a line; a model call that succeeds is not logged."""
    with worker("ours", redis_url, tmp_path) as log:
        fail_once(redis_url, log)

    text = log.read_text()
    lines = text.splitlines()
    assert len([line for line in lines if "run.failed" in line and "ERROR" in line]) == 1
    assert len([line for line in lines if "llm.retrying" in line and "code=llm.rate_limit" in line]) == 1
    assert len([line for line in lines if "thread.failed" in line]) == 1
    start = lines[: next(n for n, line in enumerate(lines) if " ready." in line)]
    advice = [line for line in start if " WARNING " in line or " ERROR " in line]
    assert all("worker.superuser" in line for line in advice), advice
    assert len(advice) == _warns_about_this_user()
    assert "You're running the worker" not in text
    assert sum(line.startswith("20") for line in start) < 15, (
        "the start of a worker, as root and without a TTY"
    )
    assert "HTTP Request" not in text
    assert "a line of httpx" in text, "other lines of httpx are kept"


@pytest.mark.parametrize(
    ("uid", "group", "is_logged"),
    [(0, "root", True), (10001, "sudo", True), (10001, None, True), (10001, "agents", False)],
)
def test_a_worker_with_the_rights_of_root_says_so_in_one_line(
    uid: int,
    group: str | None,
    is_logged: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """In a group without a name, too, as Celery does. Celery's own warning is hidden."""

    def group_of(_: int) -> tuple[str]:
        if group is None:
            raise KeyError("no such group")
        return (group,)

    for name in ("getuid", "geteuid", "getgid", "getegid"):
        monkeypatch.setattr(os, name, lambda: uid)
    monkeypatch.setattr(platforms.grp, "getgrgid", group_of)
    log_superuser(Celery("shop", set_as_current=False))

    found = [record.getMessage() for record in caplog.records]
    assert [f"uid={uid}" in line and "worker.superuser" in line for line in found] == [True] * is_logged
    assert len(recwarn) == 0


def _warns_about_this_user() -> bool:
    """Whether Celery would warn: these tests may be executed by root."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        platforms.check_privileges(["json"])
    return bool(found)
