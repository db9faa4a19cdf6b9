"""A project that is not installed: the worker finds its modules in the current folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.client import Client
from tests.deployment.commands import environment, running
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

FILES = {
    "project.py": "from celery import Celery\n"
    "import os, openagents_worker\n"
    "app = Celery('project', broker=os.environ['OPENAGENTS_REDIS_URL'])\n"
    "openagents_worker.register(app)\n",
    "shop.py": "from openagents_worker import tool\n"
    "@tool\n"
    "async def weather(city: str) -> str:\n"
    "    'Tells the weather in a city.'\n"
    "    return f'{city}: sunny'\n",
    "agents.json": json.dumps(
        {
            "agents": [
                {
                    "id": "clerk",
                    "name": "Clerk",
                    "llm": {
                        "provider": "scripted",
                        "script": [
                            {"tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
                            {"text": "asked"},
                        ],
                    },
                    "memory": {"type": "buffer"},
                    "pattern": {"type": "react"},
                    "tools": [{"id": "weather", "impl": "shop.weather"}],
                }
            ]
        }
    ),
}


@pytest.mark.share(of=2)
@pytest.mark.parametrize("pool", ["ours", "processes"])
def test_a_tool_beside_the_app_is_found(pool: str, tmp_path: Path) -> None:
    """Celery finds the app in the current directory, and only the agents file names the tool."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    arguments = ["-l", "INFO", "-Q", "agents", *(["--pool", pool, "-c", "1"] if pool != "ours" else [])]
    with EmbeddedRedis() as redis, Client(redis.url) as client:
        env = environment(redis.url, PYTHONPATH="", OPENAGENTS_CONFIG="agents.json")
        command = ["celery", "-A", "project", "worker", *arguments]
        with running(command, env, tmp_path, cwd=tmp_path) as worker:
            wait_for(lambda: " ready." in worker.said or not worker.left(), "the worker is ready")
            assert " ready." in worker.said, worker.said
            handle = client.submit({"agent_id": "clerk", "session_id": "s", "input_text": "Hello"})
            assert handle.wait(60).final_output == "asked"
