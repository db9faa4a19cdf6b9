"""`openagents-worker validate`: everything that would keep a worker from starting, in one answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AGENT = {
    "id": "echo",
    "name": "Echo",
    "llm": {"provider": "mock"},
    "memory": {"type": "buffer"},
    "pattern": {"type": "react"},
}
BROKEN = """{"agents": [
  {"id": "a", "name": "A", "llm": {"provider": "openai_compatible", "api_key_env": "NO_SUCH_KEY"},
   "memory": {"type": "buffer"}, "pattern": {"type": "react", "config": {"max_step": 5}}},
  {"id": "b", "name": "B", "llm": {"provider": "mock"}, "patern": {},
   "memory": {"type": "buffer"}, "pattern": {"type": "react"},
   "tools": [{"id": "files", "type": "read_file",
              "config": {"root": 5}}]}
]}"""


def validate(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OPENA")}
    return subprocess.run(
        [sys.executable, "-m", "openagents_worker.cli", "validate", *arguments],
        env={**clean, **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


PYTHON_AGENTS = """
from openagents_worker import Agent, register_agent

register_agent(Agent("helper", llm={"provider": "mock"}, tools=[lambda: None] if BROKEN else []))
"""


@pytest.mark.parametrize("is_broken", [False, True])
def test_agents_in_python_are_checked_like_those_of_the_file(tmp_path: Path, is_broken: bool) -> None:
    """Beside them, or without a file. A problem names the module and the line."""
    (tmp_path / "helpers.py").write_text(f"BROKEN = {is_broken}\n{PYTHON_AGENTS}")
    (tmp_path / "agents.json").write_text(json.dumps({"agents": [AGENT]}))
    file = {} if is_broken else {"OPENAGENTS_CONFIG": str(tmp_path / "agents.json")}
    done = validate(OPENAGENTS_IMPORTS="helpers", PYTHONPATH=str(tmp_path), cwd=tmp_path, **file)
    if is_broken:
        assert done.returncode == 2
        assert "agents in Python:" in done.stderr
        assert "the agent 'helper' at helpers:5: tools[0]" in done.stderr
    else:
        assert done.stdout == f"{tmp_path / 'agents.json'}: valid; agents: echo, helper\n"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.json"
    path.write_text(BROKEN)
    return path


def test_everything_is_told_at_once_and_the_given_file_is_named(broken: Path) -> None:
    """Settings, plugins' modules, the file and what it names: a line each, with the place to go to."""
    done = validate(
        str(broken),
        OPENAGENTS_CONFIG="another.json",
        OPENAGENTS_CONCURENCY="5",
        OPENAGENTS_IMPORTS="no.such.module",
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert "another.json" not in done.stderr
    file, *lines = done.stderr.splitlines()
    assert file == f"error: config.validation: {broken}:"
    assert [line.strip().partition("; ")[0].removesuffix(" (plugin.config)") for line in lines] == [
        "environment: cannot import 'no.such.module', named by OPENAGENTS_IMPORTS: "
        "ModuleNotFoundError: No module named 'no'",
        "OPENAGENTS_CONCURENCY: unknown setting",
        "line 2: agents[0].llm.api_key_env: the environment variable NO_SUCH_KEY is not set",
        "line 3: agents[0].pattern.config.max_step: unknown key",
        "line 4: agents[1].patern: unknown key",
        "line 7: agents[1].tools[0].config.root: input should be a valid string",
    ]


def test_programs_get_the_same_as_an_object(broken: Path) -> None:
    """File, and of each problem path, line, code, message and hint."""
    done = validate(str(broken), "--json")

    assert done.returncode == 2
    context = json.loads(done.stdout)["error"]["context"]
    assert context["file"] == str(broken)
    found: list[dict[str, Any]] = context["problems"]
    assert [(each["path"], each["line"], each["code"]) for each in found] == [
        ("agents[0].llm.api_key_env", 2, "plugin.config"),
        ("agents[0].pattern.config.max_step", 3, "plugin.config"),
        ("agents[1].patern", 4, "config.validation"),
        ("agents[1].tools[0].config.root", 7, "plugin.config"),
    ]
    assert found[1]["hint"] == "did you mean 'max_steps'?"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no such file"),
        ("{", "not JSON at line 1, column 2"),
        ('{"agents": [],\n"agents": []}', "twice, at line 1 and at line 2"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, says: str) -> None:
    """The one that was given; no setting is mentioned that has nothing to do with it."""
    path = tmp_path / "agents.json"
    if text is not None:
        path.write_text(text)

    done = validate(str(path), OPENAGENTS_CONFIG="another.json")

    assert done.returncode == 2
    assert done.stderr.startswith(f"error: config.load: {path}: ")
    assert says in done.stderr
    assert "OPENAGENTS_CONFIG" not in done.stderr


def test_wrong_settings_do_not_hide_the_file(broken: Path) -> None:
    """Each wrong variable is a line of its own."""
    done = validate(str(broken), OPENAGENTS_LEASE_MS="soon", OPENAGENTS_QUEUE="a b")

    assert done.returncode == 2
    for said in ("OPENAGENTS_LEASE_MS: ", "OPENAGENTS_QUEUE: ", "line 4: agents[1].patern"):
        assert said in done.stderr


def test_a_right_file_is_right(tmp_path: Path) -> None:
    """Nothing on standard error."""
    path = tmp_path / "agents.json"
    path.write_text(json.dumps({"agents": [AGENT]}))

    done = validate(str(path))

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{path}: valid; agents: echo\n"
