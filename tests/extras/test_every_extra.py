"""Every extra, installed from a wheel into an empty environment: what it promises works there.

Each environment is a project of its own with an app, an agents file and tools; its Redis is a real one, and
its model is scripted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from tests.adopt.declared import BASE, OF_THE_HOST, PACKAGE, extra_of, modules
from tests.deployment.commands import Running, free_port
from tests.deployment.flower import Flower
from tests.extras.environments import EXTRAS, Environment, Environments
from tests.support.waiting import wait_for

pytestmark = pytest.mark.extras

USER = "operator:only-for-this-test"

BARE: tuple[str, ...] = ()
COMBINATIONS: list[tuple[str, ...]] = [
    BARE,
    *((extra,) for extra in EXTRAS),
    ("worker", "flower"),  # the image
    ("worker", "embedded"),  # a product's tests
    EXTRAS,
]

PROJECT = {
    "deploy.py": """
from openagents_worker.settings import load_settings
from openagents_worker.celery.app import make_worker_app

app = make_worker_app(load_settings())
""",
    "shop.py": """
import os
from openagents_worker import tool

@tool
async def weather(city: str) -> str:
    "Tells the weather in a city."
    return f"{city}: sunny"

@tool(cpu_bound=True)
def add_up(upto: int) -> int:
    "Adds numbers in a process of its own."
    return sum(range(upto))
""",
    "agents.json": json.dumps(
        {
            "agents": [
                {
                    "id": "clerk",
                    "name": "Clerk",
                    "memory": {"type": "buffer"},
                    "pattern": {"type": "react"},
                    "llm": {
                        "provider": "scripted",
                        "script": [
                            {"tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
                            {"tool_calls": [{"name": "add_up", "arguments": {"upto": 10}}]},
                            {"tool_calls": [{"name": "calc", "arguments": {"expression": "17*23"}}]},
                            {"text": "391"},
                        ],
                    },
                    "tools": [
                        {"id": "weather", "impl": "shop.weather"},
                        {"id": "add_up", "impl": "shop.add_up"},
                        {"id": "calc", "type": "calc"},
                    ],
                }
            ]
        }
    ),
}

DEV = ("openagents-worker", "dev", "--json", "--redis-port=0", "--flower-port=0")
PRODUCER = """
import json
from openagents_worker import RunRequest, run_agent

handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="s1", input_text="What is 17*23?"))
failed = [event.payload for event in handle.events() if event.name == "tool.failed"]
result = handle.wait(timeout=60)
print(json.dumps({"output": result.final_output, "tools": result.usage.tool_calls, "failed": failed}))
"""


@dataclass(frozen=True)
class Site:
    """An installation, a Redis, and a worker: its own, or where it has none that of a full installation."""

    environment: Environment
    worker: Running
    env: dict[str, str]

    @property
    def has_worker(self) -> bool:
        return "worker" in self.environment.extras

    def run(self, command: str, *arguments: str) -> Any:
        return self.environment.run(command, *arguments, **self.env)


def named(extras: tuple[str, ...]) -> str:
    return ",".join(extras) or "base"


@pytest.fixture(scope="module", params=COMBINATIONS, ids=named)
def site(environments: Environments, request: pytest.FixtureRequest) -> Generator[Site]:
    extras: tuple[str, ...] = request.param
    here = environments.with_extras(*extras)
    serving = here if "worker" in extras else environments.with_extras("worker")
    for environment in (here, serving):
        environment.write(PROJECT)
    with ExitStack() as held:
        redis = held.enter_context(EmbeddedRedis())
        env = {"OPENAGENTS_REDIS_URL": redis.url, "OPENAGENTS_CONFIG": "agents.json"}
        worker = held.enter_context(serving.started("celery", "-A", "deploy", "worker", "-l", "INFO", **env))
        wait_for(lambda: " ready." in worker.said or not worker.left(), "the worker is ready")
        assert " ready." in worker.said, worker.said
        yield Site(here, worker, env)


def test_there_is_no_test_runner(site: Site) -> None:
    """Nothing of what the tests need hides what is missing."""
    for name in ("pytest", "hypothesis", "pip"):
        assert site.run("python", "-c", f"import {name}").returncode == 1


def test_every_module_of_it_can_be_imported(site: Site) -> None:
    """And nothing is missing that another module would have brought."""
    extras = {BASE, *site.environment.extras}
    promised = [name for name in modules() if extra_of(name) in extras and name not in OF_THE_HOST]
    names = [f"{PACKAGE}.{name}" for name in promised if not name.endswith("__main__")]

    assert site.environment.python(IMPORT_EACH.format(names=names)) == ""


IMPORT_EACH = """
import importlib
for name in {names!r}:
    try:
        importlib.import_module(name)
    except BaseException as error:
        print(f"{{name}}: {{type(error).__name__}}: {{error}}")
"""


@pytest.mark.parametrize("site", [BARE, ("flower",), EXTRAS], indirect=True, ids=named)
def test_every_command_explains_itself(site: Site) -> None:
    """Also those that need more than is installed."""
    listed = site.run("openagents-worker", "--help")
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.partition("Show this message")[2].splitlines()
    names = [line.split()[0] for line in lines if re.match(r"  \w", line)]

    assert {"run", "worker", "validate", "dev"} <= set(names)
    assert site.environment.python(EXPLAIN_EACH.format(names=names)).count("Usage: ") == len(names)


EXPLAIN_EACH = """
import os, sys
import openagents_worker.cli.commands
from openagents_worker.cli import main
for name in {names!r}:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.argv = ["openagents-worker", name, "--help"]
        try:
            main()
        except SystemExit as ended:
            sys.stdout.flush()
            os._exit(ended.code)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_the_agents_file_is_valid_or_the_extra_is_named(site: Site) -> None:
    """To check an agents file is to make its parts, which is a worker's work."""
    done = site.environment.run("openagents-worker", "validate", **site.env, PYTHONPATH=".")

    if site.has_worker:
        assert (done.returncode, done.stdout) == (0, "agents.json: valid; agents: clerk\n")
    else:
        assert done.returncode == 2
        assert "pip install 'openagents-worker[worker]'" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_producer_gets_its_answer(site: Site) -> None:
    """From a worker that was started as `celery -A … worker`, with tools on the loop and in a process."""
    told = json.loads(site.environment.python(PRODUCER, **site.env))

    assert told == {"output": "391", "tools": 3, "failed": []}


@pytest.mark.parametrize("site", [BARE, ("worker",), EXTRAS], indirect=True, ids=named)
def test_the_command_line_submits_and_lists(site: Site) -> None:
    """What a person types after installing."""
    ran = site.run("openagents-worker", "run", "clerk", "What is 17*23?")
    listed = site.run("openagents-worker", "runs", "--json")

    assert (ran.returncode, ran.stdout) == (0, "391\n"), ran.stderr
    assert listed.returncode == 0
    assert {item["state"] for item in json.loads(listed.stdout)["items"]} == {"completed"}


@pytest.mark.parametrize("site", [("worker",), EXTRAS], indirect=True, ids=named)
def test_the_loop_is_uvloops_where_the_extra_is_there(site: Site) -> None:
    """And asyncio's own elsewhere."""
    done = site.run("celery", "-A", "deploy", "inspect", "stats", "--json")
    ((_, stats),) = json.loads(done.stdout).items()

    assert stats["pool"]["loop"] == ("uvloop" if "uvloop" in site.environment.extras else "asyncio")


@pytest.mark.parametrize("site", [("flower",), ("worker", "flower"), EXTRAS], indirect=True, ids=named)
def test_flower_answers_and_knows_the_worker(site: Site) -> None:
    """Also where it is installed without a worker: it looks at others'."""
    flower = Flower(free_port(), USER)
    command = ("celery", "-A", "deploy", "flower", "--address=127.0.0.1", f"--port={flower.port}")
    with site.environment.started(*command, **site.env, FLOWER_BASIC_AUTH=USER) as process:
        wait_for(lambda: flower.get("/healthcheck")[0] == 200 or not process.left(), "Flower answers")
        assert process.left(), process.said
        workers = wait_for(lambda: flower.json("/api/workers?refresh=1"), "Flower has seen the worker")
        pages = [flower.get(page)[0] for page in ("/", "/tasks", "/broker")]

    assert len(workers) == 1
    assert pages == [200, 200, 200]
    # SIGTERM raises SystemExit wherever Flower is at that moment: also in a __del__, and Python prints that.
    tracebacks = process.said.split("Traceback")[1:]
    assert [each for each in tracebacks if "SystemExit: 0" not in each] == []


@pytest.mark.parametrize("site", [("embedded",), ("worker", "embedded"), EXTRAS], indirect=True, ids=named)
def test_the_embedded_server_is_there(site: Site) -> None:
    """Found without one on PATH, started, and ended."""
    told = site.environment.python(
        "from openagents_worker.local.redis_server import EmbeddedRedis\n"
        "import redis\n"
        "with EmbeddedRedis() as server:\n"
        "    client = redis.Redis.from_url(server.url)\n"
        "    print(client.ping())\n"
        "    client.close()\n",
        PATH="/nowhere",
    )

    assert told == "True\n"


@pytest.mark.parametrize("site", [EXTRAS], indirect=True, ids=named)
def test_one_command_starts_all_there_is(site: Site) -> None:
    """`openagents-worker dev` with a Redis, agents and a model of its own; a run; SIGTERM ends it all."""
    with site.environment.started(*DEV, OPENAGENTS_CONFIG="") as dev:
        told = json.loads(
            wait_for(lambda: dev.said.strip() or (not dev.left() and "null"), "it says where it is")
        )
        ran = site.environment.run(
            "openagents-worker", "run", "assistant", "17*23?", OPENAGENTS_REDIS_URL=told["redis_url"]
        )
        flower = Flower(int(told["flower_url"].rpartition(":")[2]))
        assert flower.get("/healthcheck")[0] == 200
        code = dev.terminate()
        wait_for(lambda: not dev.left(), "no process is left")

    assert (ran.returncode, ran.stdout) == (0, 'The tool returned: {"result":391}\n'), ran.stderr
    assert code == 0


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_a_pool_that_replaces_sockets_and_threads_is_refused(pool: str, environments: Environments) -> None:
    """At the start, with what to do instead, and before anything is consumed."""
    environment = environments.with_extras("worker", beside=("gevent", "eventlet"))
    environment.write(PROJECT)
    with EmbeddedRedis() as redis:
        done = environment.run(
            *("celery", "-A", "deploy", "worker", "--pool", pool),
            OPENAGENTS_REDIS_URL=redis.url,
            OPENAGENTS_CONFIG="agents.json",
        )

    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: config.validation: " in done.stderr
    assert pool in done.stderr
    assert "hint: omit --pool" in done.stderr
