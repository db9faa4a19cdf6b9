"""`openagents-worker validate` imports the code of an application as its worker does, and explains
failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.adopt.project import write_project

COMMAND = Path(sys.executable).with_name("openagents-worker")
"""The installed script: unlike `python -m` it does not look for modules in the current directory."""
TOOL = "from openagents_worker import tool\n@tool\ndef look() -> str:\n    'Looks.'\n    return ''\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A Django project whose tool imports a model."""
    write_project(tmp_path, "http://127.0.0.1:1/v1")
    return tmp_path


def validate(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENAGENTS_", "DJANGO", "PYTHONPATH"))
    }
    ours = {"OPENAGENTS_CONFIG": "agents.json", "PRODUCT_REDIS": "redis://127.0.0.1:1", **env}
    return subprocess.run(
        [str(COMMAND), "validate", *arguments],
        cwd=folder,
        env={**clean, **ours},
        capture_output=True,
        text=True,
        timeout=60,
    )


def write(folder: Path, **modules: str) -> None:
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


def write_agents(folder: Path, impl: str) -> None:
    clerk: dict[str, Any] = {
        "id": "clerk",
        "name": "Clerk",
        "llm": {"provider": "mock"},
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
        "tools": [{"id": "look", "impl": impl}],
    }
    (folder / "agents.json").write_text(json.dumps({"agents": [clerk]}))


@pytest.mark.parametrize("name", ["config", "config.celery:app"])
def test_an_app_is_named_as_for_celery(project: Path, name: str) -> None:
    """The project's Django is set up by Celery, so a tool that imports a model can be loaded."""
    done = validate(project, "-A", name)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "agents.json: valid; agents: clerk\n"


def test_without_an_app_django_is_set_up_as_in_a_worker_of_ours(project: Path) -> None:
    """`DJANGO_SETTINGS_MODULE` suffices: `openagents-worker worker` does the same."""
    done = validate(project, DJANGO_SETTINGS_MODULE="config.settings")

    assert (done.returncode, done.stderr) == (0, "")


def test_a_tool_that_needs_django_without_it_is_one_error(project: Path) -> None:
    """No traceback; the message names the setting."""
    done = validate(project)

    assert (done.returncode, done.stdout) == (2, "")
    assert "(plugin.load)" in done.stderr
    assert "ImproperlyConfigured" in done.stderr
    assert "DJANGO_SETTINGS_MODULE" in done.stderr
    assert "Traceback" not in done.stderr


def test_modules_of_the_current_directory_are_imported(tmp_path: Path) -> None:
    """Tools and `OPENAGENTS_IMPORTS`, in an installed command, too."""
    write(
        tmp_path,
        tools="from openagents_worker import tool\n@tool\ndef look() -> str:\n    'Looks.'\n    return ''\n",
    )
    write(tmp_path, more="")
    write_agents(tmp_path, "tools.look")

    done = validate(tmp_path, OPENAGENTS_IMPORTS="more")

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "files", "said"),
    [
        (["-A", "nowhere"], {}, "No module named 'nowhere'"),
        (["-A", "shop:nothing"], {"shop": "x = 1\n"}, "has no attribute 'nothing'"),
        (["-A", "shop:x"], {"shop": "x = 1\n"}, "is not a Celery app, but an object of type int"),
        (["-A", "shop"], {"shop": "\n1 / 0\n"}, "ZeroDivisionError: division by zero (shop.py:2)"),
        (
            ["-A", "shop"],
            {"shop": "from celery import Celery\napp = Celery('shop')\n"},
            "call openagents_worker.register(app)",
        ),
        (
            ["-A", "shop"],
            {
                "shop": "from celery import Celery\nfrom openagents_worker import register\n"
                "app = Celery('shop', include=['more'])\nregister(app)\n",
                "more": "raise ValueError('no more')\n",
            },
            "ValueError: no more (more.py:1)",
        ),
    ],
)
def test_an_app_that_cannot_be_loaded_is_one_error(
    tmp_path: Path, arguments: list[str], files: dict[str, str], said: str
) -> None:
    """With its code, what was raised, and where."""
    write(tmp_path, tools=TOOL, **files)
    write_agents(tmp_path, "tools.look")

    done = validate(tmp_path, *arguments)

    assert done.returncode == 2
    assert done.stderr.startswith("error: config.error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["raise OSError('disk')", "def broken(:"])
def test_a_plugin_that_cannot_be_imported_is_one_error(tmp_path: Path, text: str) -> None:
    """Whatever the module raises."""
    write(tmp_path, tools=f"{text}\n")
    write_agents(tmp_path, "tools.look")

    done = validate(tmp_path)

    assert done.returncode == 2
    assert "(plugin.load)" in done.stderr
    assert "agents[0].tools[0].impl" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_imports_from_the_current_directory(tmp_path: Path, redis_url: str) -> None:
    """`openagents-worker worker`, as installed, finds the tools that `validate` has found."""
    write(tmp_path, tools=TOOL)
    write_agents(tmp_path, "tools.look")
    env = {**os.environ, "OPENAGENTS_CONFIG": "agents.json", "OPENAGENTS_REDIS_URL": redis_url}
    worker = subprocess.Popen(
        [str(COMMAND), "worker"], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )
    assert worker.stderr is not None
    try:
        lines = iter(worker.stderr.readline, "")
        assert any("worker.registered" in line for line in lines)
    finally:
        worker.kill()
        worker.wait()
        worker.stderr.close()
