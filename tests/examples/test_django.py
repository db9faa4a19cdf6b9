"""The Django example, seen from outside: over HTTP, with its own worker."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.local.child_process import ChildProcess
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings
from tests.support.waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.long

EXAMPLE = Path(__file__).parents[2] / "examples" / "django"


@dataclass(frozen=True)
class Product:
    """The product, which runs as its README says. `url` is its address; `cut_off` one whose Redis is away."""

    url: str
    cut_off: str
    no_redis: str
    manage: Callable[..., str]


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Generator[Product]:
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
        serve = [*manage, "runserver", "--noreload", "127.0.0.1:0"]
        web = _started(held, "web", serve, env)
        nobody = held.enter_context(_closed_port())
        cut_off = _started(held, "cut off", serve, {**env, "OPENAGENTS_REDIS_URL": nobody})
        for server in (web, cut_off):
            server.wait_until(lambda server=server: _address(server) != "", "says its address", PATIENCE_S)
        client = held.enter_context(Client(settings=load_settings(env)))
        workers = client.store.keys("workers")
        worker.wait_until(lambda: bool(client.store.redis.exists(workers)), "registered in Redis", PATIENCE_S)

        def run(*command: str, redis_url: str = redis.url) -> str:
            done = subprocess.run(
                [*manage, *command],
                env={**env, "OPENAGENTS_REDIS_URL": redis_url},
                check=True,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )
            return done.stdout.strip()

        yield Product(_address(web), _address(cut_off), nobody, run)


@contextmanager
def _closed_port() -> Generator[str]:
    """The URL of a Redis where nobody listens; the port is kept, so that nobody else takes it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"redis://127.0.0.1:{held.getsockname()[1]}/0"


def _started(held: ExitStack, name: str, command: list[str], env: Mapping[str, str]) -> ChildProcess:
    process = ChildProcess(name, command, env, lambda *_: None)
    held.callback(process.stop, 20)
    return process


def _address(web: ChildProcess) -> str:
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
            said = error.read()
            return error.code, json.loads(said) if said.startswith(b"{") else None


def test_a_question_is_answered(product: Product) -> None:
    """Asked over HTTP, carried by the worker, stored by the product's own linked task."""
    status, asked = ask(f"{product.url}/questions/", {"customer": "ada", "text": "Where is my parcel?"})

    page = f"{product.url}/questions/{asked['id']}/"
    wait_for(lambda: ask(page)[1]["answer"], "the answer is stored", timeout=PATIENCE_S)
    assert status == 202
    assert ask(page)[1] == {
        "text": "Where is my parcel?",
        "answer": "Thank you for asking.",
        "state": "SUCCESS",
    }


def test_a_question_that_is_rolled_back_has_no_run(product: Product) -> None:
    """Neither is there: the run is submitted by the commit."""
    _, asked = ask(f"{product.url}/questions/", {"customer": "ada", "text": "Never mind.", "give_up": True})

    assert asked["run_id"]
    assert ask(f"{product.url}/questions/{asked['id']}/")[0] == 404


def test_a_question_that_redis_missed_is_submitted_later(product: Product) -> None:
    """Redis is away at the commit: the question is stored, its run is not, and both are told.

    Submitted again, also more than once, it is one run.
    """
    status, asked = ask(f"{product.cut_off}/questions/", {"customer": "bob", "text": "Is anybody there?"})
    page = f"{product.url}/questions/{asked['id']}/"

    assert (status, asked["error"]) == (503, "redis.unreachable")
    assert ask(page)[1] == {"text": "Is anybody there?", "answer": "", "state": "MISSING"}

    assert product.manage("submit_missing").startswith("submitted 1 of ")
    wait_for(lambda: ask(page)[1]["answer"], "the answer is stored", timeout=PATIENCE_S)
    assert ask(page)[1]["state"] == "SUCCESS"
    assert product.manage("submit_missing").startswith("submitted 0 of ")


def test_what_a_commit_without_redis_leaves(product: Product) -> None:
    """The transaction is committed, the block raises, and Django calls no later callback of it."""
    program = """
import json
from django.db import transaction
from questions.models import Question
from shop.celery import run_agent
called, raised = [], None
request = {"agent_id": "clerk", "session_id": "eve", "input_text": "x", "run_id": "question-of-eve"}
try:
    with transaction.atomic():
        Question.objects.create(customer="eve", text="x", run_id="question-of-eve", answer="-")
        transaction.on_commit(lambda: called.append("earlier"))
        handle = run_agent.delay_on_commit(request)
        transaction.on_commit(lambda: called.append("later"))
except Exception as error:
    raised = error.code
print(json.dumps([raised, handle.id, called, Question.objects.filter(customer="eve").count()]))
"""
    said = product.manage("shell", "-v", "0", "-c", program, redis_url=product.no_redis)

    assert json.loads(said) == ["redis.unreachable", "question-of-eve", ["earlier"], 1]
