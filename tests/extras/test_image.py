"""The image: the Dockerfile followed in an empty environment, its command, and a product's image on top."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.client import Client
from tests.deployment.commands import ROOT, free_port, running
from tests.deployment.compose import SERVICES
from tests.deployment.flower import Flower
from tests.deployment.image import Image, dockerfile_of_the_page
from tests.extras.environments import Environments
from tests.support.waiting import wait_for

pytestmark = pytest.mark.extras

USER = "operator:only-for-this-test"


@pytest.fixture(scope="module")
def image(environments: Environments, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Its packages come from the index, as in a build."""
    image = Image(tmp_path_factory.mktemp("image"), environments.new_environment(f"env-{os.getpid()}-image"))
    image.build((ROOT / "Dockerfile").read_text(), ROOT)
    return image


@pytest.fixture(scope="module")
def redis_of_the_image() -> Generator[str]:
    with EmbeddedRedis() as redis:
        yield redis.url


def test_the_image_carries_a_run(image: Image, redis_of_the_image: str, tmp_path: Path) -> None:
    """Its own command is a worker, which has the shipped agents."""
    url = redis_of_the_image
    env = image.env({"OPENAGENTS_REDIS_URL": url, "OPENAI_API_KEY": "nobody asks for it"})
    with running(image.command, env, tmp_path, cwd=image.here) as worker, Client(url) as client:
        wait_for(lambda: " ready." in worker.said or not worker.left(), "the worker is ready")
        assert " ready." in worker.said, worker.said
        handle = client.submit({"agent_id": "echo", "session_id": "s", "input_text": "Hello"})

        assert handle.wait(60).final_output == "Echo: Hello (history=0)"
        assert worker.terminate() == 0


@pytest.mark.parametrize("service", ["flower", "producer"])
def test_the_other_services_start_from_it(
    service: str, image: Image, redis_of_the_image: str, tmp_path: Path
) -> None:
    """With the commands of the compose file."""
    flower = Flower(free_port(), USER)
    env = image.env(
        {
            "OPENAGENTS_REDIS_URL": redis_of_the_image,
            "FLOWER_BASIC_AUTH": USER,
            "FLOWER_PORT": str(flower.port),
        }
    )
    command = [str(part) for part in SERVICES[service]["command"]]
    if service == "producer":
        command += ["--detach"]  # nobody executes it here
    with running(command, env, tmp_path, cwd=image.here) as process:
        if service == "flower":
            wait_for(lambda: flower.get("/healthcheck")[0] == 200 or not process.left(), "Flower answers")
            assert flower.get("/")[0] == 200, process.said
        else:
            wait_for(lambda: not process.left(), "the producer has ended")
            assert process.process.wait() == 0, process.said


def test_a_products_own_code_gets_into_it(image: Image, redis_of_the_image: str, tmp_path: Path) -> None:
    """With the Dockerfile of docs/deployment.md: a tool, its agents file, and a package of its own."""
    context = tmp_path / "context"
    files = {
        "requirements.txt": "humanize\n",
        "shop/__init__.py": "",
        "shop/tools.py": TOOLS,
        "agents.json": AGENTS,
    }
    for name, text in files.items():
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text(text)

    image.build(dockerfile_of_the_page(), context)

    env = image.env({"OPENAGENTS_REDIS_URL": redis_of_the_image})
    validated = subprocess.run(
        ["openagents-worker", "validate"],
        cwd=image.here,
        env={**env, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert validated.stdout == "config/agents.json: valid; agents: clerk\n", validated.stderr
    with (
        running(image.command, env, tmp_path, cwd=image.here) as worker,
        Client(redis_of_the_image) as client,
    ):
        wait_for(lambda: " ready." in worker.said or not worker.left(), "the worker is ready")
        assert " ready." in worker.said, worker.said
        handle = client.submit({"agent_id": "clerk", "session_id": "s", "input_text": "Hello"})
        assert handle.wait(60).final_output == "done"
        assert [event.name for event in handle.events()].count("tool.succeeded") == 1


TOOLS = """
import humanize
from openagents_worker import tool

@tool
async def count(parcels: int) -> str:
    "Says how many parcels there are."
    return humanize.intcomma(parcels)
"""
AGENTS = json.dumps(
    {
        "agents": [
            {
                "id": "clerk",
                "name": "Clerk",
                "llm": {
                    "provider": "scripted",
                    "script": [
                        {"tool_calls": [{"name": "count", "arguments": {"parcels": 1000}}]},
                        {"text": "done"},
                    ],
                },
                "memory": {"type": "buffer"},
                "pattern": {"type": "react"},
                "tools": [{"id": "count", "impl": "shop.tools.count"}],
            }
        ]
    }
)
