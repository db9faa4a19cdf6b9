"""The Django example, seen from outside: over HTTP, with its own worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.cli.stack import Process
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings
from openagents_worker.store.embedded import EmbeddedRedis
from tests.waiting import wait_for

EXAMPLE = Path(__file__).parents[2] / "examples" / "django"
PATIENCE_S = 60


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """The product's address; it runs as its README says."""
    folder = tmp_path_factory.mktemp("django")
    with ExitStack() as held:
        redis = held.enter_context(EmbeddedRedis())
        env = {
            **os.environ,
            "OPENAGENTS_REDIS_URL": redis.url,
            "OPENAGENTS_CONFIG": str(EXAMPLE / "agents.json"),
            "DATABASE": str(folder / "db.sqlite3"),
            "PYTHONPATH": str(EXAMPLE),
            "PYTHONUNBUFFERED": "1",
        }
        manage = [sys.executable, str(EXAMPLE / "manage.py")]
        subprocess.run([*manage, "migrate"], env=env, check=True, capture_output=True, timeout=PATIENCE_S)
        celery = [sys.executable, "-m", "celery", "-A", "shop", "--workdir", str(EXAMPLE), "worker"]
        worker = _started(held, "worker", [*celery, "-Q", "celery,agents", "-c", "2", "-l", "INFO"], env)
        web = _started(held, "web", [*manage, "runserver", "--noreload", "127.0.0.1:0"], env)
        web.wait_until(lambda: _address(web) != "", "says its address", PATIENCE_S)
        client = held.enter_context(Client(settings=load_settings(env)))
        workers = client.store.keys("workers")
        worker.wait_until(lambda: bool(client.store.redis.exists(workers)), "registered in Redis", PATIENCE_S)
        yield _address(web)


def _started(held: ExitStack, name: str, command: list[str], env: Mapping[str, str]) -> Process:
    process = Process(name, command, env, lambda *_: None)
    held.callback(process.stop, 20)
    return process


def _address(web: Process) -> str:
    said = [line.split()[-1].rstrip("/") for line in web.lines if "server at http://" in line]
    return said[0] if said else ""


def ask(url: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of a page."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data)  # noqa: S310 - http, to this machine
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - as above
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None


def test_a_question_is_answered(product: str) -> None:
    """Asked over HTTP, carried by the worker, stored by the product's own linked task."""
    status, asked = ask(f"{product}/questions/", {"customer": "ada", "text": "Where is my parcel?"})

    page = f"{product}/questions/{asked['id']}/"
    wait_for(lambda: ask(page)[1]["answer"], "the answer is stored", timeout=PATIENCE_S)
    assert status == 202
    assert ask(page)[1] == {
        "text": "Where is my parcel?",
        "answer": "Thank you for asking.",
        "state": "SUCCESS",
    }


def test_a_question_that_is_rolled_back_has_no_run(product: str) -> None:
    """Neither is there: the run is submitted by the commit."""
    _, asked = ask(f"{product}/questions/", {"customer": "ada", "text": "Never mind.", "give_up": True})

    assert asked["run_id"]
    assert ask(f"{product}/questions/{asked['id']}/")[0] == 404
