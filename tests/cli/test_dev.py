"""`init` and `dev`: a project that works at once, and a worker that follows the changes of its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openagents_worker.cli.project_files import FILES
from openagents_worker.local.child_process import port_or_free
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.client import Client
from tests.cli.conftest import Command
from tests.support.development import PATIENCE_S, Development, developing
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


def test_another_scripted_model_answers(project: Path) -> None:
    """A file with its replies."""
    (project / "replies.json").write_text(json.dumps([{"text": "from the file"}]))
    with developing(project, "--model", "replies.json", "--no-reload") as dev:
        assert ask(dev) == "from the file\n"
        assert dev.model_url is not None
