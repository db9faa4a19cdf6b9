"""Invalid queue names, on the command line and at the start of a worker, are rejected at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.deployment import PATIENCE_S, ROOT


def called(
    folder: Path, *arguments: str, queue: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process, without a Redis."""
    agent = {"id": "a", "name": "a", "llm": {"provider": "mock"}, "pattern": {"type": "react"}}
    file = folder / "agents.json"
    file.write_text(
        json.dumps({"version": "1.0", "agents": [{**agent, "memory": {"type": "buffer"}, "queue": queue}]})
    )
    return subprocess.run(
        [sys.executable, "-m", "openagents_worker.cli", *arguments],
        env={
            **os.environ,
            "OPENAGENTS_CONFIG": str(file),
            "OPENAGENTS_REDIS_URL": "redis://127.0.0.1:1/0",
            **env,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


CALLS: dict[str, tuple[tuple[str, ...], str | None, dict[str, str], str, int]] = {
    "run": (("run", "a", "Go.", "--queue", "oa:due"), None, {}, "request.invalid", 2),
    "worker": (("worker", "--queues", "agents,oa:due"), None, {}, "config.validation", 2),
    "the setting": (("worker",), None, {"OPENAGENTS_QUEUE": "oa:due"}, "config.validation", 2),
    "the setting of another prefix": (
        ("worker",), None, {"OPENAGENTS_QUEUE": "x:d", "OPENAGENTS_KEY_PREFIX": "x"}, "config.validation", 2,
    ),
    "the prefix": (("worker",), None, {"OPENAGENTS_KEY_PREFIX": "_kombu.binding.x"}, "config.validation", 2),
    "an agent": (("worker",), "oa:due", {}, "config.validation", 2),
    "an agent, kombu's": (("worker",), "unacked", {}, "config.", 2),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "queue", "env", "code", "exit_code"), CALLS.values(), ids=CALLS.keys())
def test_a_queue_with_the_name_of_a_key_is_rejected(
    tmp_path: Path,
    arguments: tuple[str, ...],
    queue: str | None,
    env: dict[str, str],
    code: str,
    exit_code: int,
) -> None:
    """The error names the queue and describes valid names."""
    ended = called(tmp_path, *arguments, queue=queue, **env)

    output = ended.stderr + ended.stdout
    assert ended.returncode == exit_code, output
    assert code in output
    assert "is not a valid" in output
    assert "Traceback" not in output
