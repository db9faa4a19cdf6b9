"""The command line, as a process: what it prints, where, and with which code it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.cli.dev_model import reply
from openagents_worker.errors import LLMResponseError
from openagents_worker.local.stack import Stack
from openagents_worker.producer.client import Client
from openagents_worker.testing.model_server import ModelServerRequest
from tests.support.scripts import Hand
from tests.support.waiting import PATIENCE_S, wait_for

COMMAND = [sys.executable, "-m", "openagents_worker.cli"]
AGENT = {
    "id": "echo",
    "name": "Echo",
    "llm": {"provider": "mock"},
    "memory": {"type": "buffer"},
    "pattern": {"type": "react"},
}


@pytest.fixture
def agents_file(tmp_path: Path) -> Path:
    path = tmp_path / "agents.json"
    path.write_text(json.dumps({"agents": [AGENT]}))
    return path


@pytest.fixture
def env(agents_file: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENA", "FLOWER_"))}
    return {**clean, "OPENAGENTS_CONFIG": str(agents_file)}


@pytest.fixture
def stack(env: dict[str, str]) -> Generator[Stack]:
    with Stack(env=env) as stack:
        stack.start_worker("w1", concurrency=4)
        yield stack


def command(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=env, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run"], 1, "Missing argument 'AGENT'"),
        (["rum"], 1, "No such command"),
        (["show", "r1"], 4, "redis.unreachable"),
        (["run", "echo", "hi"], 4, "redis.unreachable"),
        (["validate", "nowhere.json"], 2, "there is no such file"),
        (["validate"], 0, ""),
        (["schema"], 0, ""),
        (["--help"], 0, ""),
    ],
)
def test_an_exit_code_says_what_kind_of_failure_it_was(
    arguments: list[str], code: int, says: str, env: dict[str, str]
) -> None:
    """0 success, 1 usage, 2 validation, 3 the run failed, 4 cannot reach Redis; never a traceback."""
    done = command(*arguments, env={**env, "OPENAGENTS_REDIS_URL": "redis://127.0.0.1:1/0"})

    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_file_is_explained_for_people_and_for_programs(
    agents_file: Path, env: dict[str, str]
) -> None:
    """Place, what was found, what would be right; with --json the same as one object."""
    agents_file.write_text(json.dumps({"agents": [{**AGENT, "patern": {}}]}))

    for_people = command("validate", env=env)
    for_programs = command("validate", "--json", env=env)

    assert for_people.returncode == for_programs.returncode == 2
    assert "did you mean 'pattern'" in for_people.stderr
    assert json.loads(for_programs.stdout)["error"]["code"] == "config.validation"


def test_a_misspelt_variable_makes_validation_fail(env: dict[str, str]) -> None:
    """Nothing would read it, and nobody would notice."""
    done = command("validate", env={**env, "OPENAGENTS_CONCURENCY": "5"})

    assert done.returncode == 2
    assert "OPENAGENTS_CONCURRENCY" in done.stderr


def test_the_schema_knows_what_an_agent_is(env: dict[str, str]) -> None:
    """An editor completes an agents file with it."""
    schema = json.loads(command("schema", env=env).stdout)

    assert "agents" in schema["properties"]


def test_a_run_that_waits_can_be_looked_at_and_cancelled(env: dict[str, str], redis_url: str) -> None:
    """By its id, without any worker; cancelling what is over says so."""
    env = {**env, "OPENAGENTS_REDIS_URL": redis_url}
    with Hand(redis_url) as hand:
        hand.submit("r1")

        shown = json.loads(command("show", "r1", "--json", env=env).stdout)
        cancelled = json.loads(command("cancel", "r1", "--reason", "enough", "--json", env=env).stdout)
        again = command("cancel", "r1", env=env)
        watched = command("watch", "r1", env=env)
        unknown = command("show", "r2", env=env)

    assert (shown["state"], shown["agent_id"]) == ("queued", "assistant")
    assert cancelled == {"run_id": "r1", "answer": "CANCELLED"}
    assert "has already ended" in again.stdout
    assert "run.cancelled reason=enough" in watched.stderr
    assert watched.returncode == 3
    assert unknown.returncode == 2


def test_runs_and_sessions_are_listed_page_by_page(env: dict[str, str], redis_url: str) -> None:
    """For people and for programs; the next page is asked for with what the one before said."""
    env = {**env, "OPENAGENTS_REDIS_URL": redis_url}
    with Client(redis_url) as client:
        for number in (1, 2, 3):
            request = {"agent_id": "clerk", "session_id": f"s{number % 2}", "input_text": "hi"}
            client.submit({**request, "run_id": f"r{number}", "labels": {"no": str(number)}})

        page = json.loads(command("runs", "--limit", "2", "--json", env=env).stdout)
        rest = command("runs", "--cursor", page["next_cursor"], env=env)
        found = json.loads(command("runs", "--label", "no=2", "--state", "queued", "--json", env=env).stdout)
        wrong = command("runs", "--label", "no", env=env)
        listed = json.loads(command("sessions", "--json", env=env).stdout)
        shown = command("session", "s1", env=env)
        pruned = json.loads(command("prune", "--json", env=env).stdout)
        for run_id in ("r3", "r2", "r1"):
            client.cancel(run_id)

    assert [record["run_id"] for record in page["items"]] == ["r3", "r2"]
    assert "r1 " in rest.stdout
    assert [record["run_id"] for record in found["items"]] == ["r2"]
    assert (wrong.returncode, "is not of the form NAME=VALUE" in wrong.stderr) == (1, True)
    assert [one["session_id"] for one in listed["items"]] == ["s1", "s0"]
    assert ("holder    r1" in shown.stdout, "waiting   r3" in shown.stdout) == (True, True)
    assert pruned == {"removed": 0}


def test_a_session_names_the_runs_that_left_nothing_in_it(env: dict[str, str], redis_url: str) -> None:
    """A failed question is not in the conversation; who reads the session hears of it and why."""
    env = {**env, "OPENAGENTS_REDIS_URL": redis_url}
    with Client(redis_url) as client, Hand(redis_url) as hand:
        for run_id in ("good", "bad", "waits"):
            client.submit({"agent_id": "clerk", "session_id": "s1", "input_text": "hi", "run_id": run_id})
        hand.claim("good")
        hand.finish("good", transcript=[{"role": "user", "content": "hi", "run_id": "good"}])
        hand.claim("bad")
        hand.finish("bad", error=LLMResponseError("the provider answered 400"))
        shown = command("session", "s1", env=env)
        told = json.loads(command("session", "s1", "--json", env=env).stdout)
        client.cancel("waits")

    assert shown.stdout.splitlines()[-2:] == [
        "user: hi",
        "not in the transcript: run bad failed (llm.response: the provider answered 400)",
    ]
    assert told["left_nothing"] == ["bad"]


@pytest.mark.slow
def test_a_run_prints_its_answer_on_standard_output_and_the_rest_beside(
    stack: Stack, env: dict[str, str]
) -> None:
    """So that a pipe gets the answer; with --json every event and then the result."""
    env = {**env, "OPENAGENTS_REDIS_URL": stack.redis_url}

    for_people = command("run", "echo", "hello", "--session", "s1", env=env)
    lines = command("run", "echo", "hello", "--json", env=env).stdout.splitlines()
    detached = command("run", "echo", "hello", "--detach", env=env).stdout.strip()
    shown = command("show", command_id(lines), env=env).stdout
    unknown_agent = command("run", "ecko", "hello", env=env)

    assert for_people.stdout == "Echo: hello (history=0)\n"
    assert "run.completed" in for_people.stderr
    assert "1 model call," in for_people.stderr
    assert [json.loads(line)["name"] for line in lines[:-1]][-2:] == [
        "run.completed",
        "session.run.completed",
    ]
    assert json.loads(lines[-1])["result"]["final_output"] == "Echo: hello (history=0)"
    assert command("watch", detached, env=env).stdout == "Echo: hello (history=0)\n"
    assert "state     completed" in shown
    assert unknown_agent.returncode == 2
    assert "did you mean 'echo'" in unknown_agent.stderr


def command_id(lines: list[str]) -> str:
    run_id: str = json.loads(lines[-1])["result"]["run_id"]
    return run_id


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_dev_starts_everything_and_leaves_nothing(number: signal.Signals, env: dict[str, str]) -> None:
    """Redis, a worker, Flower and a scripted model; whatever ends it ends them all."""
    dev_command = [*COMMAND, "dev", "--json", "--redis-port=0", "--flower-port=0"]
    with subprocess.Popen(dev_command, env=env, stdout=subprocess.PIPE, text=True) as dev:
        assert dev.stdout is not None
        urls = json.loads(dev.stdout.readline())
        children = children_of(dev.pid)
        with urllib.request.urlopen(f"{urls['flower_url']}/healthcheck", timeout=PATIENCE_S) as answer:  # noqa: S310 - http, here
            assert answer.status == 200
        ran = command("run", "echo", "hi", env={**env, "OPENAGENTS_REDIS_URL": urls["redis_url"]})

        dev.send_signal(number)
        dev.wait(60)

    assert len(children) == 4
    assert ran.stdout == "Echo: hi (history=0)\n", ran.stderr
    assert dev.returncode == (0 if number is not signal.SIGKILL else -signal.SIGKILL)
    wait_for(lambda: not any(map(is_running, children)), "no child is left")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "What is 17*23?"}], {"expression": "17*23"}),
        ([{"role": "user", "content": "hi"}], None),
    ],
)
def test_the_model_of_dev_uses_the_calculator_for_arithmetic(
    messages: list[dict[str, Any]], expected: dict[str, str] | None
) -> None:
    """Enough to see a tool call without a key."""
    tools = [{"type": "function", "function": {"name": "calc"}}]

    answer = reply(ModelServerRequest(messages, tools, "m", False, {}, 0, {}))

    if expected is None:
        assert answer["text"].startswith("You said: hi")
    else:
        assert answer["tool_calls"][0]["arguments"] == expected
