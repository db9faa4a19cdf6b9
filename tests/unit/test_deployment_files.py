"""What an operator edits: compose file, Procfile, Redis and Flower settings, Makefile. Each is tried out."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import honcho.environ
import jsonschema
import pytest
import redis
import yaml

from openagents_worker.settings import load_settings, unknown_variables
from openagents_worker.store.embedded import find_server
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
SHOW_FLOWER_OPTIONS = """
import json, sys
from flower.command import apply_env_options, apply_options, options
apply_env_options()
apply_options("flower", ["--conf=config/flowerconfig.py", *sys.argv[1:]])
print(json.dumps({name: getattr(options, name) for name in ("address", "basic_auth", "read_only")}))
"""
SHOW_FLOWER_COLUMNS = """
from flower.command import apply_env_options, apply_options, options
from flower.views.tasks import visible_task_columns
apply_options("flower", ["--conf=config/flowerconfig.py"])
print(*(name for name, _ in visible_task_columns(options.tasks_columns)), options.format_task.__name__)
"""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def flower(*arguments: str, show: str = SHOW_FLOWER_OPTIONS, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", show, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]} | env,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_compose_file_is_one_by_the_compose_specification(compose: dict[str, Any]) -> None:
    """Checked against the specification's own schema."""
    schema = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(compose)


def test_every_service_waits_for_a_healthy_redis_and_says_how_it_is(compose: dict[str, Any]) -> None:
    """`docker compose up` on a new machine works at the first try."""
    for name in ("worker", "flower", "producer"):
        assert compose["services"][name]["depends_on"]["redis"] == {"condition": "service_healthy"}
    for name in ("redis", "worker", "flower"):
        assert compose["services"][name]["healthcheck"]["test"]


def test_only_flower_is_published_and_only_on_this_machine(compose: dict[str, Any]) -> None:
    """Redis has no password there, so nobody outside of the project's network may reach it."""
    published = {
        name: service["ports"] for name, service in compose["services"].items() if "ports" in service
    }
    assert published == {"flower": ["127.0.0.1:5555:5555"]}


def test_redis_keeps_its_data_in_a_volume(compose: dict[str, Any]) -> None:
    """`docker compose down` and `up` again lose no run."""
    assert "redis-data:/data" in compose["services"]["redis"]["volumes"]
    assert "redis-data" in compose["volumes"]


def test_a_stopped_worker_has_time_to_hand_its_runs_over(compose: dict[str, Any]) -> None:
    """Docker kills after 10 s by default, which is before our own drain ends."""
    grace_s = int(compose["services"]["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > load_settings({}).drain_timeout_s


def test_what_compose_mounts_and_the_dockerfile_copies_exists(compose: dict[str, Any]) -> None:
    """A path that is misspelt would be an empty folder in the container."""
    mounts = [
        v for service in compose["services"].values() for v in service.get("volumes", ()) if v[0] == "."
    ]
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for path in [*(mount.split(":")[0] for mount in mounts), *" ".join(copied).split()]:
        assert (ROOT / path).exists(), path


def test_the_variables_of_the_compose_file_are_ours(compose: dict[str, Any]) -> None:
    """A misspelt variable would silently do nothing."""
    for service in compose["services"].values():
        env = service.get("environment", {})
        assert unknown_variables(env) == []
        load_settings(env)


def test_the_procfile_starts_worker_and_flower() -> None:
    """`honcho start` runs both on this machine."""
    processes = honcho.environ.parse_procfile((ROOT / "Procfile").read_text()).processes
    commands = {name: shlex.split(command) for name, command in processes.items()}
    assert commands["worker"][:4] == ["celery", "-A", "tasks", "worker"]
    assert commands["flower"] == ["celery", "-A", "tasks", "flower", "--conf=config/flowerconfig.py"]


def test_redis_starts_with_our_config_and_is_durable(tmp_path: Path) -> None:
    """A real server reads `config/redis.conf`: on disk every second, nothing evicted, this machine only."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(find_server()),
        str(ROOT / "config" / "redis.conf"),
        "--port",
        str(port),
        "--dir",
        str(tmp_path),
    ]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL) as server,
        redis.Redis(port=port, decode_responses=True) as client,
    ):
        try:
            wait_for(lambda: answers(client), "the server answers")
            config = client.config_get()
        finally:
            server.terminate()
    assert (config["appendonly"], config["appendfsync"]) == ("yes", "everysec")
    assert config["maxmemory-policy"] == "noeviction"
    assert config["bind"].split()[0] == "127.0.0.1"
    assert config["save"] == "3600 1"


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_flower_listens_on_this_machine_and_only_shows() -> None:
    """Flower's own defaults are every interface, no password and all buttons."""
    assert json.loads(flower().stdout) == {"address": "127.0.0.1", "basic_auth": [], "read_only": True}


def test_flower_refuses_to_be_open_to_others_without_a_password() -> None:
    """It says which variable to set."""
    for refused in (flower("--address=0.0.0.0"), flower(FLOWER_ADDRESS="192.0.2.1"), flower("--address=::")):
        assert refused.returncode == 1
        assert "set FLOWER_BASIC_AUTH=user:password" in refused.stderr


def test_flower_may_be_open_to_others_with_a_password() -> None:
    """As in the compose file."""
    opened = flower("--address=0.0.0.0", FLOWER_BASIC_AUTH="me:pw,you:pw", FLOWER_READ_ONLY="0")
    assert json.loads(opened.stdout) == {
        "address": "0.0.0.0",  # noqa: S104 - nothing listens here, only options are read
        "basic_auth": ["me:pw", "you:pw"],
        "read_only": False,
    }


def test_flowers_buttons_are_there_where_they_work() -> None:
    """Without a password only on this machine's loopback; a socket's reader is not known."""
    local = flower(FLOWER_READ_ONLY="0")
    behind_a_socket = flower("--unix_socket=flower.sock", FLOWER_READ_ONLY="0")
    said_to_be_open = flower(
        "--unix_socket=flower.sock", FLOWER_READ_ONLY="0", FLOWER_UNAUTHENTICATED_API="1"
    )

    assert json.loads(local.stdout)["read_only"] is False, local.stderr
    assert json.loads(behind_a_socket.stdout)["read_only"] is True
    assert json.loads(said_to_be_open.stdout)["read_only"] is False


def test_flowers_rows_show_agent_session_run_and_reason() -> None:
    """Every column is one that Flower knows, or it would leave it out without a word."""
    shown = flower(show=SHOW_FLOWER_COLUMNS).stdout.split()

    assert shown == [
        *("args", "state", "exception", "uuid", "received", "runtime", "worker", "name", "format_task"),
    ]


def test_an_empty_or_half_password_is_none() -> None:
    """`FLOWER_BASIC_AUTH=` from an unset variable must not open the door."""
    assert flower("--address=0.0.0.0", FLOWER_BASIC_AUTH="").returncode == 1
    assert "form user:password" in flower(FLOWER_BASIC_AUTH="me:").stderr


def test_make_names_a_python_that_is_too_old_or_missing(tmp_path: Path) -> None:
    """The first thing a newcomer types answers with what to install."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2"\nexit 1\n')
    old.chmod(0o755)
    for python, says in ((str(old), "Python 3.9.2 is too old"), ("no-python", "no-python is missing")):
        run = subprocess.run(
            ["make", "test", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, timeout=30
        )
        assert run.returncode != 0
        assert says in run.stdout


def test_make_lists_its_targets() -> None:
    """`make` alone explains itself."""
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=30).stdout
    for target in ("demo", "test", "check", "dev", "bench", "clean"):
        assert f"make {target} " in listed


def test_ci_runs_make_test() -> None:
    """What CI runs is what anybody can run."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
