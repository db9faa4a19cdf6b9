"""The development stack: what `openagents-worker dev` starts, and commands beside it.

Real: all of it. It is the command of a user, with free ports in place of the usual ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["COMMAND", "DEV", "PATIENCE_S", "Development", "developing"]

COMMAND = [sys.executable, "-m", "openagents_worker.cli"]
DEV = [*COMMAND, "dev", "--json", "--redis-port=0", "--flower-port=0"]
PATIENCE_S = 120


@dataclass(frozen=True)
class Development:
    """A running stack, seen from another terminal. `said` has the lines of its standard error."""

    folder: Path
    env: Mapping[str, str] = field(repr=False)  # may contain the key of a model
    model_url: str | None
    said: list[str] = field(default_factory=list)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in another terminal, with pipes for its input and its output."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=self.env, text=True, stdin=pipe, stdout=pipe, stderr=pipe
        )

    def run(self, *command: str, typed: str = "") -> str:
        """What a command prints on standard output. It must end well; `typed` is its input."""
        with self.start(*command) as process:
            try:
                out, err = process.communicate(typed, PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert process.returncode == 0, f"{command}: {out}{err}"
        return out

    def ours(self, *arguments: str) -> str:
        """What `openagents-worker` prints with these arguments."""
        return self.run(*COMMAND, *arguments)


@contextmanager
def developing(
    folder: Path, *options: str, env: Mapping[str, str] | None = None, real_model: bool = False
) -> Generator[Development]:
    """`dev` in this folder during the block.

    The environment has no settings of ours but `env`. With `real_model` it keeps those of OpenAI's model.
    """
    hidden = ("OPENAGENTS_",) if real_model else ("OPENAGENTS_", "OPENAI_")
    bare = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | dict(env or {})
    with subprocess.Popen(
        [*DEV, *options], cwd=folder, env=bare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as dev:
        assert dev.stdout is not None
        assert dev.stderr is not None
        said: list[str] = []
        reader = threading.Thread(target=said.extend, args=(dev.stderr,))
        reader.start()
        try:
            first = dev.stdout.readline()
            assert first, f"dev has not started: {_ended(said, reader)}"
            urls = json.loads(first)
            there = {**bare, "OPENAGENTS_REDIS_URL": urls["redis_url"]}
            yield Development(folder, there, urls["model_url"], said)
        finally:
            dev.send_signal(signal.SIGTERM)
            dev.wait(PATIENCE_S)
            reader.join()
    assert dev.returncode == 0, said


def _ended(said: Sequence[str], reader: threading.Thread) -> str:
    reader.join()
    return "".join(said)
