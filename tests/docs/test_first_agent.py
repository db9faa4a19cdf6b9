"""The page for newcomers, followed step by step: its files, `openagents-worker dev`, its commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from openagents_worker.local.child_process import ChildProcess
from tests.docs.blocks import ROOT, blocks_of_text
from tests.docs.conftest import Deployment

pytestmark = pytest.mark.long

PAGE = "docs/first-agent.md"
PATIENCE_S = 120


def test_the_page_for_newcomers_works_as_it_says(deployment: Deployment) -> None:
    """`dev` starts everything; asked in another terminal, the agent answers, and is listed."""
    folder = deployment.project(PAGE)
    bare = {k: v for k, v in deployment.env.items() if not k.startswith(("OPENAGENTS_", "OPENAI_"))}
    env = {**bare, "OPENAGENTS_CONFIG": str(folder / "agents.json"), "PYTHONPATH": f"{folder}:{ROOT}"}
    command = [sys.executable, "-m", "openagents_worker.cli", "dev", "--json", "--redis-port=0"]
    command += ["--flower-port=0"]
    dev = ChildProcess("dev", command, {**env, "PYTHONUNBUFFERED": "1"}, lambda *_: None)
    try:
        dev.wait_until(lambda: any(line.startswith("{") for line in dev.lines), "is ready", PATIENCE_S)
        started = json.loads(next(line for line in dev.lines if line.startswith("{")))
        env["OPENAGENTS_REDIS_URL"] = started["redis_url"]
        printed = [ask(line, folder, env) for line in commands_of_the_page()]
    finally:
        dev.stop(PATIENCE_S)

    assert len(printed) == 3
    assert "391" in printed[0]
    assert "What is 17*23?" in printed[1]
    assert "support" in printed[2]


def commands_of_the_page() -> list[str]:
    """Those that are typed in the other terminal."""
    page = (ROOT / PAGE).read_text()
    lines = [line for block in blocks_of_text(PAGE, page) for line in block.text.splitlines()]
    return [line[2:] for line in lines if re.match(r"\$ openagents-worker (run|session|runs)\b", line)]


def ask(line: str, folder: Path, env: dict[str, str]) -> str:
    ended = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
