"""docker-compose.yml without Docker: the command and the health check of every service, as they are written.

What a container's network and mounts would give them comes from the environment.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from openagents_worker.local.redis_server import EmbeddedRedis, find_server
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from tests.deployment.commands import ROOT, Running, environment, free_port, running
from tests.deployment.compose import SERVICES, environment_of, filled_in, load
from tests.deployment.flower import Flower
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

USER = "operator:only-for-this-test"
DOTENV = {"REDIS_PASSWORD": "only-for_this_test", "FLOWER_BASIC_AUTH": USER}
SECRET = "the input of a run"


def command(service: str) -> list[str]:
    return [filled_in(str(part), DOTENV) for part in SERVICES[service]["command"]]


def is_healthy(service: str, env: Mapping[str, str]) -> bool:
    """The service's own health check, as Docker would execute it."""
    kind, *test = SERVICES[service]["healthcheck"]["test"]
    if kind == "CMD-SHELL":
        test = ["sh", "-c", test[0].replace("$$", "$")]
    check = subprocess.run(test, cwd=ROOT, env=env, capture_output=True, timeout=240)
    return check.returncode == 0


@pytest.fixture(scope="module")
def env() -> Generator[dict[str, str]]:
    """The environment of the services: a Redis, a port for Flower and its password."""
    with EmbeddedRedis() as redis:
        with Redis.from_url(redis.url) as client:
            client.config_set("requirepass", DOTENV["REDIS_PASSWORD"])
        url = environment_of("worker", DOTENV)["OPENAGENTS_REDIS_URL"]
        url = url.replace("redis:6379", f"127.0.0.1:{redis.port}")
        yield environment(
            url,
            FLOWER_PORT=str(free_port()),
            FLOWER_BASIC_AUTH=USER,
            OPENAGENTS_HEALTH_PORT=str(free_port()),
        )


@pytest.fixture(scope="module")
def worker(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    with running(command("worker"), env, tmp_path_factory.mktemp("worker")) as worker:
        wait_for(lambda: " ready." in worker.said, "the worker is ready", timeout=60)
        yield worker


@pytest.fixture(scope="module")
def flower(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Generator[Flower]:
    with running(command("flower"), env, tmp_path_factory.mktemp("flower")):
        flower = Flower(int(env["FLOWER_PORT"]), USER)
        wait_for(lambda: flower.get("/healthcheck")[0] == 200, "Flower answers", timeout=60)
        yield flower


def test_redis_starts_with_a_password_and_is_healthy(tmp_path: Path) -> None:
    """With this project's configuration; `redis-cli`, which is the image's, is stood in for by one that
    does what its health check needs: it sends its arguments, after the password of `REDISCLI_AUTH`."""
    program, config, *options = command("redis")
    (mount,) = (volume for volume in SERVICES["redis"]["volumes"] if volume.endswith(f":{config}:ro"))
    (included,) = SERVICES["redis"]["configs"]
    password = tmp_path / "password.conf"
    password.write_text(filled_in(load()["configs"][included["source"]]["content"], DOTENV))
    options = [str(password) if option == included["target"] else option for option in options]
    assert program == "redis-server"
    port = free_port()
    # The last --bind counts: this machine is not the project's network.
    here = ["--port", str(port), "--dir", str(tmp_path), "--bind", "127.0.0.1"]
    env = {**environment("", PORT=str(port)), "PATH": f"{stand_in(tmp_path)}:/usr/bin:/bin"}
    env |= environment_of("redis", DOTENV)

    assert not is_healthy("redis", env)
    with running([str(find_server()), str(ROOT / mount.split(":")[0]), *options, *here], env, tmp_path):
        wait_for(lambda: is_healthy("redis", env), "Redis is healthy")
        assert not is_healthy("redis", {**env, "REDISCLI_AUTH": "wrong"})
        url = f"redis://:{DOTENV['REDIS_PASSWORD']}@127.0.0.1:{port}/0"
        with Redis.from_url(url, decode_responses=True) as client:
            says = client.config_get("maxmemory*")
    assert (says["maxmemory"], says["maxmemory-policy"]) == (str(2**30), "noeviction")


def stand_in(folder: Path) -> Path:
    program = folder / "redis-cli"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, socket, sys\n"
        "with socket.create_connection(('127.0.0.1', int(os.environ['PORT'])), timeout=3) as redis:\n"
        "    redis.sendall(b'AUTH ' + os.environ['REDISCLI_AUTH'].encode() + b'\\r\\n')\n"
        "    redis.recv(100)\n"
        "    redis.sendall(' '.join(sys.argv[1:]).encode() + b'\\r\\n')\n"
        "    print(redis.recv(100).decode())\n"
    )
    program.chmod(0o755)
    return folder


def test_the_worker_becomes_healthy(worker: Running, env: dict[str, str]) -> None:
    """The check asks this very worker, and whatever else is there does not count."""
    wait_for(lambda: is_healthy("worker", env), "the worker is healthy")
    assert not is_healthy("worker", {**env, "OPENAGENTS_HEALTH_PORT": str(free_port())})
    assert environment_of("worker", DOTENV)["OPENAGENTS_HEALTH_PORT"] == "9808"


def test_flower_becomes_healthy(flower: Flower, env: dict[str, str]) -> None:
    """The check needs no password; without a Flower it fails."""
    assert is_healthy("flower", env)
    assert not is_healthy("flower", {**env, "FLOWER_PORT": str(free_port())})


def test_the_producer_gets_its_answer(worker: Running, env: dict[str, str]) -> None:
    """`docker compose run --rm producer`: the agent `echo` needs no key of a model."""
    ended = subprocess.run(
        command("producer"), cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
    )

    assert (ended.returncode, ended.stdout) == (0, "Echo: Hello from compose (history=0)\n")


def test_every_service_that_ends_runs_keeps_them_equally_long() -> None:
    """A button of Flower cancels and forks runs with the times and limits of Flower's own environment."""
    dotenv = {**DOTENV, **dict.fromkeys(load()["x-submission"], "7")}

    for service in ("worker", "flower", "producer"):
        missing = set(load()["x-submission"]) - set(environment_of(service, dotenv))
        assert not missing, service


@pytest.mark.parametrize(
    "page", ["/", "/workers", "/tasks", "/broker", "/api/workers", "/api/tasks", "/metrics"]
)
def test_flowers_pages_are_for_those_with_the_password(flower: Flower, page: str) -> None:
    """Everything else is 401."""
    assert flower.get(page)[0] == 200
    assert Flower(flower.port).get(page)[0] == 401
    assert Flower(flower.port, "operator:wrong").get(page)[0] == 401


def test_flower_knows_the_worker(worker: Running, flower: Flower) -> None:
    """With both of its queues, the runs' and the wake-ups'."""
    workers = wait_for(
        lambda: flower.json("/api/workers?refresh=1"), "Flower has seen the worker", timeout=30
    )

    ((name, told),) = workers.items()
    assert name.startswith("celery@")
    assert {queue["name"] for queue in told["active_queues"]} == {"agents", "agents.wake"}


def test_flower_shows_a_run_and_not_its_input(worker: Running, flower: Flower, env: dict[str, str]) -> None:
    """State and ids; what was asked and what was answered is nobody's business there."""
    with Client(env["OPENAGENTS_REDIS_URL"]) as client:
        handle = client.submit({"agent_id": "echo", "session_id": "shown", "input_text": SECRET})
        assert SECRET in str(handle.wait(60).final_output)
        assert handle.record().state is RunState.COMPLETED

    def shown() -> Any:
        task = flower.json(f"/api/task/info/{handle.id}")
        return task if task and task["state"] == "SUCCESS" else None

    task = wait_for(shown, "Flower has heard of the run's end")
    page, listed = flower.get(f"/task/{handle.id}")[1], flower.get("/api/tasks")[1]

    ids = f"agent=echo session=shown run={handle.id}"
    assert task["args"] == ids
    assert re.search(r"SUCCESS", page)
    assert ids in page
    for text in (str(task), page, listed):
        assert SECRET not in text
