"""Zep: its own package, as it is installed today, and a server of ours with the paths of its API."""

from __future__ import annotations

import json
import signal
import subprocess
import sysconfig
import threading
import venv
from collections.abc import Callable, Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.deployment import ROOT
from tests.support.runner import agent

pytestmark = pytest.mark.extras

PROGRAM = """
import asyncio, json, sys
from tests.support.runner import process

async def main(redis_url, agents, session, runs):
    async with process(redis_url, *agents) as p:
        seen = []
        for run_id in runs:
            record = await p.run(run_id, session_id=session, input_text=f"question of {run_id}")
            assert record.state == "completed", record.result
            names = [event["name"] for event in await p.events(run_id)]
            view = [r for r in await p.journal(run_id) if (r["kind"], r["name"]) == ("memory", "inject")]
            seen.append({"events": [name for name in names if "memory." in name], "view": view[0]["outcome"]})
        print(json.dumps(seen))

asyncio.run(main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4:]))
"""


DYING = """
import asyncio, json, os, signal, sys
from tests.support.runner import process
from openagents_worker.runtime.writer import RunWriter

async def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

async def main(redis_url, agents, before_finish):
    if before_finish == "True":
        RunWriter.finish = die
    async with process(redis_url, *agents, name="dies") as p:
        await p.submit("r1", input_text="question")
        await p.execute("r1")

asyncio.run(main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]))
"""
"""A worker that is killed: by the server before it answers, or itself before it stores the end of the run."""
TAKING_OVER = """
import asyncio, json, sys
from openagents_worker.store import scripts
from tests.support.runner import process

async def main(redis_url, agents):
    async with process(redis_url, *agents, name="lives") as p:
        dead = [name async for name in p.store.redis.zscan_iter(p.store.keys("workers"))]
        for name, _ in dead:
            if name.startswith("dies:"):
                await p.store.redis.zadd(p.store.keys("workers"), {name: 1})
        reclaimed = await p.store.run(scripts.reclaim(limit=9, max_recoveries=50, blameless=False))
        assert [wake.run_id for wake in reclaimed.wakes] == ["r1"]
        await p.execute("r1")
        record, events = await p.record(), await p.event_names()
        print(json.dumps([record.state, record.recoveries, [name for name in events if "memory." in name]]))

asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
"""


class Server:
    """Keeps messages by session. `fails`: it answers 500. `kill_before_answer`: it kills the process that has
    sent messages, once."""

    def __init__(self) -> None:
        self.sessions: dict[str, list[dict[str, Any]]] = {}
        self.keys: set[str | None] = set()
        self.fails = False
        self.kill_before_answer: Callable[[], object] | None = None
        self.url = ""


@pytest.fixture
def server() -> Generator[Server]:
    kept = Server()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, body: Any) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            kept.keys.add(self.headers["Authorization"])
            messages = kept.sessions.get(self._session())
            if kept.fails or messages is None:
                self._answer(500 if kept.fails else 404, {"message": "no"})
            else:
                self._answer(200, {"messages": messages})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if kept.fails:
                self._answer(500, {"message": "no"})
                return
            kept.sessions.setdefault(self._session(), []).extend(body["messages"])
            if kept.kill_before_answer is not None:
                kill, kept.kill_before_answer = kept.kill_before_answer, None
                kill()
                return
            self._answer(200, {"message": "ok"})

        def _session(self) -> str:
            parts = self.path.partition("?")[0].split("/")
            assert (parts[1:4], parts[5]) == (["api", "v2", "sessions"], "memory"), self.path
            return parts[4]

        def log_message(self, *_: Any) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield kept
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with everything that this one has, and zep-python."""
    folder = tmp_path_factory.mktemp("zep")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "zep-python>=2.0.2,<3",
    ]
    subprocess.run(install, check=True)
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(own) / "also.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    return python


def definition_for(server: Server) -> dict[str, Any]:
    config = {"api_url": server.url, "api_key": "zep-key", "memory_dir": "/nowhere"}
    return agent(memory={"type": "zep", "config": config})


def run(
    python: Path, redis_url: str, server: Server, *runs: str, session: str = "s/1"
) -> list[dict[str, Any]]:
    done = subprocess.run(
        [python, "-c", PROGRAM, redis_url, json.dumps([definition_for(server)]), session, *runs],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_turns_are_kept_in_the_server_and_shown_to_later_runs(
    python: Path, redis_url: str, server: Server
) -> None:
    """Each run stores its turn once. The id of a session cannot change the path of a request."""
    first, second = run(python, redis_url, server, "r1", "r2")

    assert first["view"] == {"ok": {"zep_memory": []}}
    assert second["view"]["ok"]["zep_memory"] == [
        {"role": "user", "content": "question of r1", "source": "zep"},
        {"role": "assistant", "content": "hello", "source": "zep"},
    ]
    assert list(server.sessions) == ["openagents-s%2F1"]
    assert [m["metadata"]["run_id"] for m in server.sessions["openagents-s%2F1"]] == ["r1", "r1", "r2", "r2"]
    assert server.keys == {"Api-Key zep-key"}


@pytest.mark.parametrize("is_answered", [False, True])
def test_a_turn_is_stored_once_although_its_worker_dies_before_the_end_is_stored(
    python: Path, redis_url: str, server: Server, is_answered: bool
) -> None:
    """The server has the turn, but the run has not ended. The next worker finds the turn by the run's id."""
    agents = json.dumps([definition_for(server)])
    dying = subprocess.Popen([python, "-c", DYING, redis_url, agents, str(is_answered)], cwd=ROOT)
    if not is_answered:
        server.kill_before_answer = dying.kill
    assert dying.wait(120) == -signal.SIGKILL
    (messages,) = server.sessions.values()
    assert len(messages) == 2

    done = subprocess.run(
        [python, "-c", TAKING_OVER, redis_url, agents], capture_output=True, text=True, timeout=120, cwd=ROOT
    )

    assert done.returncode == 0, done.stderr[-3000:]
    state, recoveries, events = json.loads(done.stdout.splitlines()[-1])
    assert (state, recoveries) == ("completed", 1)
    assert [message["metadata"]["run_id"] for message in messages] == ["r1", "r1"]
    assert "memory.writeback_failed" not in events


def test_a_server_that_fails_is_an_event_and_nothing_is_kept_elsewhere(
    python: Path, redis_url: str, server: Server
) -> None:
    """P15: the original wrote to files of the worker then, and never saved them."""
    server.fails = True

    (seen,) = run(python, redis_url, server, "r1")

    assert "memory.inject_failed" in seen["events"]
    assert "memory.writeback_failed" in seen["events"]
