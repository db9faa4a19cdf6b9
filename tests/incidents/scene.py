"""A deployment in which incidents happen, and the page about them. Real: processes and commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from openagents_worker.local.child_process import ChildProcess, free_port
from openagents_worker.local.redis_server import EmbeddedRedis
from tests.support.deployment import Installation, agent, installed
from tests.support.waiting import PATIENCE_S, wait_for

__all__ = ["PAGE", "STOP_S", "Row", "Scene", "Site", "rows", "site_in"]

PAGE = Path(__file__).parents[2] / "docs" / "incidents.md"
PROGRAM = "openagents-worker"
MODULE = "tests.incidents.agents"
TOOLS = ("hang", "block", "wait_in_thread", "refund", "charge", "crash")
STOP_S = 40.0
FAST_CLOCK = """
import sys, time
real, ahead_s = time.time, float(sys.argv.pop(1))
time.time = lambda: real() + ahead_s
from openagents_worker.cli import main
main()
"""


@dataclass(frozen=True)
class Row:
    """A row of the page. A literal is a text in backquotes; one that begins with the program is a command."""

    symptom: str
    sees: str
    todo: str

    @property
    def looks(self) -> list[str]:
        """The commands that show the incident."""
        return [each for each in _literals(self.sees) if each.startswith(PROGRAM)]

    @property
    def shown(self) -> list[str]:
        """What they, the logs or the errors contain."""
        return [each for each in _literals(self.sees) if not each.startswith(PROGRAM)]

    @property
    def steps(self) -> list[str]:
        """The commands that end the incident."""
        return [each for each in _literals(self.todo) if each.startswith(PROGRAM)]


def _literals(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def rows() -> dict[str, Row]:
    """The rows of all tables of the page, by their symptoms."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| symptom |")
    ]
    return {symptom: Row(symptom, sees, todo) for symptom, sees, todo in cells}


@dataclass(frozen=True)
class Site:
    """A deployment. `log` has the lines that its workers print."""

    shop: Installation
    redis: EmbeddedRedis
    log: list[str]

    def ensure_worker(self) -> None:
        """Start a worker for the queue of most agents if the last one has died."""
        workers = self.shop.stack.workers
        if all(worker.exit_code is not None for worker in workers):
            self.shop.stack.start_worker(f"worker{len(workers)}")

    @contextmanager
    def scene(self, symptom: str) -> Generator[Scene]:
        """One incident. Its own processes end with the block, in which all commands of the row are used."""
        self.ensure_worker()
        with ExitStack() as held:
            scene = Scene(self, rows()[symptom], held, len(self.log))
            yield scene
        assert set(scene.row.steps) <= scene.done, "the test does all that the row says"


@dataclass
class Scene:
    """An incident: what an operator sees, and does."""

    site: Site
    row: Row
    held: ExitStack
    since: int
    """The number of lines in the log before the incident."""
    ids: dict[str, str] = field(default_factory=dict)
    """The ids in place of RUN, CALL and SESSION."""
    done: set[str] = field(default_factory=set)
    codes: dict[str, int] = field(default_factory=dict)
    """The exit codes of the commands that show the incident."""

    @property
    def log(self) -> str:
        return "\n".join(self.site.log[self.since :])

    def execute(
        self, command: str, *, ahead_s: float | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Execute a command of the page, with a clock that is so many seconds ahead."""
        fast = ["-c", FAST_CLOCK, str(ahead_s)]
        return subprocess.run(
            [sys.executable, *(fast if ahead_s else ["-m", "openagents_worker.cli"]), *self._words(command)],
            env={**self.site.shop.stack._env, **env},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def _words(self, command: str) -> list[str]:
        program, *words = shlex.split(command)
        assert program == PROGRAM
        return [self.ids.get(word, word) for word in words]

    def sees(self, *texts: str, ahead_s: float | None = None, **env: str) -> str:
        """Wait until the commands of the row, the log and these texts show what the row says.

        Returns everything that was shown.
        """
        last: list[str] = []

        def is_shown() -> str:
            said = [*texts]
            for command in self.row.looks:
                done = self.execute(command, ahead_s=ahead_s, **env)
                self.codes[command] = done.returncode
                said += [done.stdout, done.stderr]
            last[:] = [*said, self.log]
            whole = "\n".join(last)
            return whole if all(each in whole for each in self.row.shown) else ""

        try:
            return wait_for(is_shown, self.row.symptom)
        except AssertionError:
            whole = "\n".join(last)
            missing = [each for each in self.row.shown if each not in whole]
            raise AssertionError(f"the row promises {missing}, but this was shown:\n{whole}") from None

    def does(self, step: str, *, code: int = 0, **env: str) -> str:
        """Execute a command that the row names in its last cell; returns its output."""
        assert step in self.row.steps
        done = self.execute(step, **env)
        assert done.returncode == code, done.stdout + done.stderr
        self.done.add(step)
        return done.stdout + done.stderr

    def starts(self, step: str, **env: str) -> ChildProcess:
        """Start a worker as the row says, for as long as the scene lasts."""
        assert step in self.row.steps
        self.done.add(step)
        return self.start_worker(*shlex.split(step)[2:], **env)

    def start_worker(self, *options: str, **more: str) -> ChildProcess:
        """Start a worker with these options and variables, and wait until it is registered."""
        client = self.site.shop.client
        before = {worker.incarnation for worker in client.workers()}
        command = [sys.executable, "-m", "openagents_worker.cli", "worker", *options]
        env = {**self.site.shop.stack._env, "PYTHONUNBUFFERED": "1", **more}
        worker = ChildProcess("worker", command, env, lambda _, line: self.site.log.append(line))
        self.held.callback(worker.stop, STOP_S)
        wait_for(
            lambda: {each.incarnation for each in client.workers() if each.is_alive} - before,
            "the worker is registered",
        )
        return worker


@contextmanager
def site_in(folder: Path, **env: str) -> Generator[Site]:
    """A deployment with a worker, and with a Redis that can be stopped and started at the same address."""
    log: list[str] = []
    tools = {name: f"{MODULE}.{name}" for name in TOOLS}
    agents: Sequence[dict[str, object]] = (
        agent("clerk", tools={**tools, "count": "tests.worker.workshop.count"}),
        agent("reports", queue="reports"),
        agent("slow", queue="slow"),
    )
    data = folder / "redis"
    data.mkdir()
    with (
        EmbeddedRedis(data, free_port()) as redis,
        installed(
            folder,
            *agents,
            redis_url=redis.url,
            say=lambda _, line: log.append(line),
            OPENAGENTS_IMPORTS=MODULE,
            OPENAGENTS_HEALTH_PORT=str(free_port()),
            **env,
        ) as shop,
    ):
        yield Site(shop, redis, log)
