"""A newcomer's first hour, from the wheel in an empty environment: two products, then what goes wrong.

Each message is asserted as the newcomer should read it: which error it is, and the word that leads on.
"""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.testing.model_server import ModelServer
from tests.deployment.commands import ROOT, Running, free_port
from tests.extras.environments import Environment, Environments
from tests.support.waiting import wait_for

pytestmark = pytest.mark.extras

NOBODY_LISTENS = "redis://127.0.0.1:1/0"


def agent(agent_id: str, *script: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "id": agent_id,
        "name": agent_id,
        "llm": {"provider": "scripted", "script": list(script)},
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
        **fields,
    }


def calls(tool: str, **arguments: Any) -> dict[str, Any]:
    return {"tool_calls": [{"name": tool, "arguments": arguments}]}


SHOP = """
from openagents_worker import tool

@tool
def price(article: str) -> int:
    "Looks up what an article costs."
    return {"pen": 2}[article]
"""

BROKEN = {
    "shop_pattern.py": """
class Broken:
    def __init__(self, config=None):
        pass

    async def execute(self):
        return 1 / 0
"""
}

DEPLOY = """
from openagents_worker.settings import load_settings
from openagents_worker.celery.app import make_worker_app

app = make_worker_app(load_settings())
"""


@dataclass(frozen=True)
class Newcomer:
    """Somebody with a terminal, an installation, and the Redis that the environment names."""

    environment: Environment
    env: dict[str, str]

    def types(self, command: str, *arguments: str, **env: str) -> CompletedProcess[str]:
        return self.environment.run(command, *arguments, **{**self.env, **env})

    def submits(self, agent_id: str, text: str = "Hello") -> str:
        """The id of a run that nobody waits for."""
        done = self.types("openagents-worker", "run", agent_id, text, "--detach")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def starts(self, held: ExitStack, command: str, *arguments: str, **env: str) -> Running:
        """A server or a worker, until the test ends."""
        return held.enter_context(self.environment.started(command, *arguments, **{**self.env, **env}))

    def starts_worker(self, held: ExitStack, *arguments: str, app: str = "deploy") -> Running:
        worker = self.starts(held, "celery", "-A", app, "worker", "-l", "INFO", *arguments)
        wait_for(lambda: " ready." in worker.said or not worker.left(), "the worker is ready")
        assert " ready." in worker.said, worker.said
        return worker


@pytest.fixture
def held() -> Generator[ExitStack]:
    with ExitStack() as held:
        yield held


@pytest.fixture
def newcomer(environments: Environments, held: ExitStack) -> Newcomer:
    """With everything that the two products need, and an empty Redis."""
    environment = environments.with_extras("worker", "flower", beside=("django>=5,<6", "fastapi", "uvicorn"))
    redis = held.enter_context(EmbeddedRedis())
    return Newcomer(environment, {"OPENAGENTS_REDIS_URL": redis.url, "OPENAGENTS_CONFIG": "agents.json"})


def writes(newcomer: Newcomer, *agents: dict[str, Any], **files: str) -> None:
    text = json.dumps({"agents": list(agents)})
    newcomer.environment.write({"deploy.py": DEPLOY, "shop_tools.py": SHOP, "agents.json": text, **files})


def ask(url: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of a page."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - http, to this machine
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode(errors="replace")
            return error.code, json.loads(text) if text.startswith("{") else text


def answers(url: str) -> bool:
    try:
        ask(url)
    except (OSError, ValueError):
        return False
    return True


# --- two products that exist ------------------------------------------------------------------------------


@pytest.fixture
def example(newcomer: Newcomer) -> Generator[Path]:
    """The folder into which a product is copied; removed, so that nothing of it is found afterwards."""
    folder = newcomer.environment.project
    before = set(folder.iterdir())
    yield folder
    for entry in set(folder.iterdir()) - before:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def test_a_django_product(newcomer: Newcomer, held: ExitStack, example: Path) -> None:
    """As its README says: migrate, a worker, the server; a question is asked and answered."""
    shutil.copytree(ROOT / "examples" / "django", example, dirs_exist_ok=True)
    migrated = newcomer.types("python", "manage.py", "migrate")
    assert migrated.returncode == 0, migrated.stderr
    port = free_port()
    newcomer.starts_worker(held, "-Q", "celery,agents", "-c", "2", app="shop")
    web = newcomer.starts(held, "python", "manage.py", "runserver", "--noreload", f"127.0.0.1:{port}")
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: answers(f"{url}/questions/1/") or not web.left(), "the server answers")

    status, asked = ask(f"{url}/questions/", {"customer": "ada", "text": "Where is my parcel?"})

    assert status == 202, web.said
    answer = wait_for(lambda: ask(f"{url}/questions/{asked['id']}/")[1]["answer"], "the answer is stored")
    assert answer == "Thank you for asking."


def test_a_fastapi_product(newcomer: Newcomer, held: ExitStack, example: Path) -> None:
    """A question over HTTP, the events as they come, and an answer."""
    target = example / "examples" / "fastapi"
    shutil.copytree(ROOT / "examples" / "fastapi", target)
    (example / "examples" / "__init__.py").touch()
    writes(newcomer, agent("assistant", {"text": "At the door."}))
    newcomer.starts_worker(held)
    port = free_port()
    web = newcomer.starts(held, "uvicorn", "examples.fastapi.app:app", "--port", str(port), PYTHONPATH=".")
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: "Uvicorn running" in web.said or not web.left(), "the server answers")

    status, run = ask(f"{url}/runs", {"text": "Where is my parcel?", "conversation": "ada"})

    assert status == 202, web.said
    with urllib.request.urlopen(f"{url}/runs/{run['run_id']}/events", timeout=60) as stream:  # noqa: S310
        assert "At the door." in stream.read().decode()
    assert ask(f"{url}/runs/nobody/events") == (
        404,
        {"code": "run.not_found", "message": ask(f"{url}/runs/nobody/events")[1]["message"]},
    )


# --- what goes wrong --------------------------------------------------------------------------------------


def test_a_tool_fails(newcomer: Newcomer, held: ExitStack) -> None:
    """Which tool, what its own code raised, and where: on the screen, in the log and in `show`."""
    tools = [{"id": "price", "impl": "shop_tools.price"}]
    writes(newcomer, agent("clerk", calls("price", article="ink"), {"text": "unknown"}, tools=tools))
    worker = newcomer.starts_worker(held)

    ran = newcomer.types("openagents-worker", "run", "clerk", "What is ink?")

    assert ran.returncode == 0
    assert ran.stdout == "unknown\n"
    [line] = [line for line in ran.stderr.splitlines() if "tool.failed" in line]
    for field in ("tool_id=price", "KeyError: 'ink'", "code=tool.error"):
        assert line.count(field) == 1
    wait_for(lambda: "WARNING runtime.calls.tool tool.failed" in worker.said, "the worker's log names it")
    assert 'return {"pen": 2}[article]' in worker.said


def test_a_pattern_fails(newcomer: Newcomer, held: ExitStack) -> None:
    """One line of the log, and the traceback of the newcomer's own code wherever the run is looked at."""
    writes(newcomer, agent("clerk", {"text": "never"}, pattern={"impl": "shop_pattern.Broken"}), **BROKEN)
    worker = newcomer.starts_worker(held)

    ran = newcomer.types("openagents-worker", "run", "clerk", "Hello", "--run-id", "broken")
    shown = newcomer.types("openagents-worker", "show", "broken")

    assert ran.returncode == 3
    for said in (ran.stderr, shown.stdout):
        assert "pattern.error" in said
        assert 'shop_pattern.py", line' in said
        assert "ZeroDivisionError" in said
    wait_for(lambda: "run.failed" in worker.said, "the worker's log has the run")
    lines = [line for line in worker.said.splitlines() if "run.failed" in line]
    assert len(lines) == 1
    for field in ("ERROR", "run_id=broken", "agent_id=clerk", "code=pattern.error", "attempts=1"):
        assert field in lines[0]


def test_there_is_no_key(newcomer: Newcomer) -> None:
    """The worker does not start; the variable is named, and the line of the file that wants it."""
    llm = {"provider": "openai_compatible", "model": "m", "api_key_env": "SHOP_KEY"}
    writes(newcomer, agent("clerk", llm=llm))

    for command in (("celery", "-A", "deploy", "worker"), ("openagents-worker", "validate")):
        done = newcomer.types(*command)
        assert done.returncode == 2
        assert "agents.json" in done.stderr
        assert "line 1: agents[0].llm.api_key_env" in done.stderr
        assert "SHOP_KEY is not set" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_key_is_wrong(newcomer: Newcomer, held: ExitStack) -> None:
    """The provider's status and words; the run has failed, and the command with it."""
    refusal = {"error": "response", "status": 401, "message": "Incorrect API key provided"}
    url = held.enter_context(ModelServer([refusal, {"text": "never"}]).serve_in_thread()).url
    llm = {"provider": "openai_compatible", "model": "m", "api_base": url, "api_key_env": "SHOP_KEY"}
    writes(newcomer, agent("clerk", llm=llm))
    with_key = Newcomer(newcomer.environment, {**newcomer.env, "SHOP_KEY": "sk-wrong-key-of-the-shop"})
    worker = with_key.starts_worker(held)

    ran = newcomer.types("openagents-worker", "run", "clerk", "Hello")

    assert ran.returncode == 3
    assert "llm." in ran.stderr
    assert "401" in ran.stderr
    assert "Incorrect API key provided" in ran.stderr
    for text in (ran.stderr, ran.stdout, worker.said):
        assert "sk-wrong-key-of-the-shop" not in text


def test_there_is_no_worker(newcomer: Newcomer, held: ExitStack) -> None:
    """The run is accepted and waits, and whoever looks is told why; a worker that comes later executes it."""
    writes(newcomer, agent("clerk", {"text": "at last"}))
    run_id = newcomer.submits("clerk")

    shown = newcomer.types("openagents-worker", "show", run_id)

    assert shown.returncode == 0
    assert "queued" in shown.stdout
    assert "no worker serves queue agents" in shown.stdout
    with newcomer.environment.started("openagents-worker", "watch", run_id, **newcomer.env) as watch:
        wait_for(lambda: "no worker serves queue agents" in watch.said, "the one who watches is told")
        newcomer.starts_worker(held)
        wait_for(lambda: "at last" in watch.said, "the run has ended")


def test_the_worker_consumes_another_queue(newcomer: Newcomer, held: ExitStack) -> None:
    """The run waits; it is not lost, and not executed by a worker of another queue."""
    writes(newcomer, agent("clerk", {"text": "at last"}))
    newcomer.starts_worker(held, "-Q", "orders")
    run_id = newcomer.submits("clerk")

    shown = newcomer.types("openagents-worker", "show", run_id)
    assert "queued" in shown.stdout
    assert "no worker serves queue agents" in shown.stdout

    newcomer.starts_worker(held, "-n", "second@%h")
    watched = newcomer.types("openagents-worker", "watch", run_id)
    assert (watched.returncode, watched.stdout) == (0, "at last\n")


@pytest.mark.parametrize(
    "command", [("run", "clerk", "Hello"), ("runs",), ("show", "some-run"), ("sessions",)], ids=" ".join
)
def test_redis_is_away(newcomer: Newcomer, command: tuple[str, ...]) -> None:
    """An exit code of its own, the address, and no traceback."""
    done = newcomer.types("openagents-worker", *command, OPENAGENTS_REDIS_URL=NOBODY_LISTENS)

    assert done.returncode == 4
    assert "redis.unreachable" in done.stderr
    assert "127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tool_is_misspelt(newcomer: Newcomer) -> None:
    """The worker does not start, and names the file, the place in it, and the tool."""
    writes(newcomer, agent("clerk", {"text": "never"}, tools=[{"id": "price", "impl": "shop_tools.prize"}]))

    done = newcomer.types("celery", "-A", "deploy", "worker")

    assert done.returncode == 2
    for word in ("plugin.load", "agents.json", "line 1: agents[0].tools[0].impl", "shop_tools.prize"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_an_agent_is_misspelt(newcomer: Newcomer, held: ExitStack) -> None:
    """Nothing is accepted, and the name that was meant is said."""
    writes(newcomer, agent("clerk", {"text": "never"}))
    newcomer.starts_worker(held)

    ran = newcomer.types("openagents-worker", "run", "clark", "Hello")

    assert ran.returncode == 2
    assert "user.agent_not_found" in ran.stderr
    assert "did you mean 'clerk'?" in ran.stderr
