"""`init` and `dev`: a project that works at once, and a worker that follows the changes of its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Generator
from pathlib import Path

import pytest

from openagents_worker.cli.commands.processes import start_lines
from openagents_worker.cli.exits import Exit
from openagents_worker.cli.project_files import FILES
from openagents_worker.local.child_process import port_or_free
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.local.stack import Stack
from openagents_worker.producer.client import Client
from tests.cli.conftest import Command, register, retire
from tests.support.development import DEV, PATIENCE_S, Development, developing
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

CHANGED = '''
from openagents_worker import tool

@tool
async def find_parcel(number: str) -> str:
    """Says where a parcel is."""
    return number
'''


@pytest.fixture
def project(tmp_path: Path, command: Command) -> Path:
    """What `init` writes."""
    folder = tmp_path / "shop"
    done = command("init", str(folder))
    assert (done.code, f"cd {folder} && make dev" in done.err) == (0, True), done.err
    return folder


def ask(dev: Development) -> str:
    """What the agent answers with its tool. The model of `dev` repeats what the tool returns."""
    return dev.ours("run", "support", "What is 6*7?")


def workers(dev: Development) -> list[str]:
    listed = json.loads(dev.ours("workers", "--json"))
    return [each["incarnation"] for each in listed["items"] if each["alive"]]


def test_a_new_worker_takes_the_place_of_the_old_one_when_code_changes(project: Path) -> None:
    """With the changed code. Code that cannot be imported changes nothing, and the error is printed."""
    with developing(project) as dev:
        assert "42" in ask(dev)
        first = workers(dev)
        assert len(first) == 1

        (project / "parcels.py").write_text("this is not Python\n")
        wait_for(lambda: any("goes on" in line for line in dev.said), "the mistake was reported", PATIENCE_S)
        assert workers(dev) == first

        (project / "parcels.py").write_text(CHANGED)
        wait_for(lambda: len(now := workers(dev)) == 1 and now != first, "a new worker", PATIENCE_S)
        assert "42" in ask(dev)

    assert any("parcels.py" in line and "changed" in line for line in dev.said)


def test_a_run_under_way_keeps_its_definition_when_the_agents_file_changes(project: Path) -> None:
    """It waits for an approval while the prompt is edited and a new worker replaces the old one."""
    file = project / "config" / "agents.json"
    agents = json.loads(file.read_text())
    agents["agents"][0]["tools"] = [{"id": "calc", "type": "calc", "approval": "always"}]
    file.write_text(json.dumps(agents))
    with developing(project) as dev, Client(dev.env["OPENAGENTS_REDIS_URL"]) as client:
        asked = {"agent_id": "support", "session_id": "s", "input_text": "What is 6*7?"}
        handle = client.submit(asked)
        wait_for(lambda: handle.approvals(), "the run waits for an approval", PATIENCE_S)
        first = workers(dev)

        agents["agents"][0]["pattern"]["config"]["system_prompt"] = "You answer customers of a bakery."
        file.write_text(json.dumps(agents))
        wait_for(lambda: len(now := workers(dev)) == 1 and now != first, "a new worker", PATIENCE_S)
        (approval,) = handle.approvals()
        client.approve(handle.id, approval.call_id, by="anna")

        result = handle.wait(PATIENCE_S)
        assert "42" in str(result.final_output), result.error_details
        names = [event.name for event in handle.events()]
    assert "replay.prompt_changed" not in names, "the model would have been asked with another prompt"


def test_the_test_of_a_new_project_passes(project: Path) -> None:
    """In the folder of the project, as `make test` there runs it."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAGENTS_", "OPENAI_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"], cwd=project, env=bare, capture_output=True, text=True
    )
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout + done.stderr


def test_init_replaces_nothing(project: Path, command: Command) -> None:
    """Neither a file that it wrote nor one that was there."""
    (project / "parcels.py").write_text("mine")
    (project / "Makefile").unlink()

    done = command("init", str(project))

    assert (done.code, "parcels.py" in done.err, "new or empty" in done.err) == (2, True, True), done.err
    assert (project / "parcels.py").read_text() == "mine"
    assert not (project / "Makefile").exists()
    assert {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()} == {*FILES} - {
        "Makefile"
    }


def test_the_usual_port_is_used_if_it_is_free() -> None:
    """Otherwise another one."""
    with EmbeddedRedis() as redis:
        taken = redis.port
        assert port_or_free(taken) != taken
    wait_for(lambda: port_or_free(taken) == taken, "the port is free again")


@pytest.fixture
def stack(redis_url: str, client: Client) -> Generator[Stack]:
    """With a worker that is registered by hand; nothing is started."""
    register(client, agents=("support",))
    with Stack(redis_url=redis_url) as stack:
        yield stack
    retire(client)


def said(stack: Stack, *, model_url: str | None = "http://model", **known: bool) -> str:
    facts = {"is_example": False, "keeps_data": True, **known}
    return "\n".join(start_lines(stack, "http://flower", model_url, **facts))


def test_what_dev_prints_can_be_typed_in_another_terminal(
    stack: Stack, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is that of this virtual environment if it is not on the path."""
    program = tmp_path / "openagents-worker"
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "dev"])
    asked = 'run support "What is 17*23?"'

    assert f"  export OPENAGENTS_REDIS_URL={redis_url}\n  {program} {asked}\n" in said(stack)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f"  openagents-worker {asked}\n" in said(stack)
    monkeypatch.setattr(sys, "argv", ["/x/openagents_worker/cli/__main__.py", "dev"])
    assert f"  {sys.executable} -m openagents_worker.cli {asked}\n" in said(stack)


def test_dev_says_that_a_real_model_answers_and_that_data_is_deleted(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real model may cost money."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert "may cost money: OPENAI_API_KEY is set" in said(stack, model_url=None)
    assert "cost" not in said(stack)
    assert "--data-dir DIR keeps it" in said(stack, keeps_data=False)
    assert "--data-dir" not in said(stack)


def test_a_password_of_redis_is_not_printed(redis_url: str, client: Client) -> None:
    """The masked URL would be useless in another terminal."""
    with Stack(redis_url=redis_url.replace("//", "//default:a7Qx93Lm@")) as stack:
        printed = said(stack)
    assert "a7Qx93Lm" not in printed
    assert "export OPENAGENTS_REDIS_URL=…  # as in this terminal: it has a password" in printed


def test_the_flower_of_dev_shows_our_pages(stack: Stack) -> None:
    """As `celery -A tasks flower` does."""
    url = stack.start_flower()
    with urllib.request.urlopen(f"{url}/runs", timeout=PATIENCE_S) as answer:  # noqa: S310 - this machine
        assert "There are no runs yet" in answer.read().decode()


@pytest.mark.parametrize("options", [("--no-reload",), ("--data-dir", "data")])
def test_dev_ends_if_its_redis_does(project: Path, options: tuple[str, ...]) -> None:
    """It says so, and what becomes of the runs, instead of workers that look for a Redis."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("OPENAGENTS_")}
    with subprocess.Popen(
        [*DEV, *options], cwd=project, env=bare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as dev:
        assert dev.stdout is not None
        with Client(json.loads(dev.stdout.readline())["redis_url"]) as client:
            pid = client.store.redis.info("server")["process_id"]
        os.kill(pid, signal.SIGKILL)
        _, said = dev.communicate(timeout=PATIENCE_S)

    assert dev.returncode == Exit.RUN_FAILED
    assert "the embedded redis exited with code -9, so dev ends" in said
    assert ("start dev again: the runs continue" in said) == ("data" in options)
    assert ("--data-dir DIR keeps them" in said) == ("data" not in options)


def test_another_scripted_model_answers(project: Path) -> None:
    """A file with its replies."""
    (project / "replies.json").write_text(json.dumps([{"text": "from the file"}]))
    with developing(project, "--model", "replies.json", "--no-reload") as dev:
        assert ask(dev) == "from the file\n"
        assert dev.model_url is not None
