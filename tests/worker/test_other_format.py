"""Two versions of the library: the newer one is this version with an incremented record format."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.local.stack import Stack
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from openagents_worker.producer.handle import RunHandle
from openagents_worker.producer.publisher import RUN_AGENT
from openagents_worker.store.formats import BY_CONTENT, NEWEST_READ
from openagents_worker.submission.submit import submit
from tests.fundamentals.shop import DELIVERY_ALLOWED
from tests.support import diary
from tests.support.deployment import ROOT, Model, agent, call, story
from tests.support.waiting import PATIENCE_S, wait_for

# Python imports `sitecustomize` at its start.
TOMORROW = """
from openagents_worker.store import formats
formats.NEWEST_READ += 1
formats.WRITTEN = formats.BY_CONTENT = formats.NEWEST_READ
"""


@pytest.fixture
def tomorrow(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH: a process that has it writes the next format."""
    folder = tmp_path / "tomorrow"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(TOMORROW)
    return folder


@pytest.fixture
def stack(tmp_path: Path) -> Generator[Stack]:
    shop = {name: f"tests.fundamentals.shop.{name}" for name in ("pay", "deliver")}
    (tmp_path / "agents.json").write_text(json.dumps({"agents": [agent("clerk", tools=shop)]}))
    model = Model()
    model.will_say(
        {"tool_calls": [call("pay", cents=30)]}, {"tool_calls": [call("deliver")]}, {"text": "done"}
    )
    with model.server.serve_in_thread():
        env = {
            **os.environ,
            diary.DIARY: str(tmp_path),
            "MODEL_URL": model.server.url,
            "OPENAGENTS_CONFIG": str(tmp_path / "agents.json"),
            "OPENAGENTS_LEASE_MS": "2000",
            "PYTHONPATH": str(ROOT),
        }
        with Stack(env=env) as stack:
            yield stack


@pytest.mark.long
def test_a_run_of_tomorrow_waits_for_a_worker_of_tomorrow(
    stack: Stack, tmp_path: Path, tomorrow: Path
) -> None:
    """Today's worker gets its wake-up, releases it, emits one event, and executes other runs meanwhile."""
    with Client(settings=stack.settings) as client:
        stack.set_env(PYTHONPATH=os.pathsep.join([str(tomorrow), str(ROOT)]))
        newer = stack.start_worker("newer")
        handle = client.submit({"agent_id": "clerk", "session_id": "s1", "input_text": "Go."})
        wait_for(
            lambda: _did(tmp_path, handle.id, "delivery started"), "the run is executed", timeout=PATIENCE_S
        )
        stack.set_env(PYTHONPATH=str(ROOT))
        today = stack.start_worker("today")
        newer.kill()

        wait_for(lambda: _was_left(client, handle.id), "today's worker has left it", timeout=PATIENCE_S)
        first_due = client.record(handle.id).due_ms
        (tmp_path / DELIVERY_ALLOWED).touch()
        own = client.submit({"agent_id": "clerk", "session_id": "s2", "input_text": "Go."})
        from_tomorrow = _send_from_a_producer_of_tomorrow(client)
        assert own.wait(timeout=PATIENCE_S).final_output == "done"
        assert from_tomorrow.wait(timeout=PATIENCE_S).final_output == "done"
        assert _was_left(client, from_tomorrow.id), "the content of a message of tomorrow is unknown"
        wait_for(
            lambda: (client.record(handle.id).due_ms or 0) > (first_due or 0),
            "it is released again",
            timeout=PATIENCE_S,
        )
        assert client.record(handle.id).state in (RunState.RETRYING, RunState.QUEUED)
        today.terminate()
        wait_for(lambda: today.exit_code is not None, "today's worker is gone", timeout=PATIENCE_S)
        stack.set_env(PYTHONPATH=os.pathsep.join([str(tomorrow), str(ROOT)]))
        stack.start_worker("newest")

        assert handle.wait(timeout=PATIENCE_S).final_output == "done"

        events = story(handle)
        left = [event.payload for event in events if event.name == "run.left_to_others"]
        assert [(payload["format"], payload["newest_read"]) for payload in left] == [
            (NEWEST_READ + 1, NEWEST_READ)
        ]
        assert str(left[0]["left_by"]).startswith("today@")
        live_workers = [str(e.worker).partition("@")[0] for e in events if e.name == "run.attempt_started"]
        assert live_workers == ["newer", "newest"]
        assert _did(tmp_path, handle.id, "paid") == 1
        assert client.store.redis.hget(client.store.keys("run", own.id), "format") == str(BY_CONTENT)


def _send_from_a_producer_of_tomorrow(client: Client) -> RunHandle[Any]:
    """A run of today's format, and a message of tomorrow's format with its id."""
    request = {"agent_id": "clerk", "session_id": "s3", "input_text": "Go."}
    handle = client.handle(submit(client.store, request, settings=client.settings).run_id)
    headers = {
        "wake_us": "9" * 16,
        "run_format": NEWEST_READ + 1,
    }  # later than every other message of the run
    client.app.send_task(
        RUN_AGENT,
        [{"an": "order"}, 2],
        task_id=handle.id,
        queue="agents",
        headers=headers,
        ignore_result=True,
    )
    return handle


def _did(folder: Path, run_id: str, what: str) -> int:
    return [line["what"] for line in diary.read(folder, run_id)].count(what)


def _was_left(client: Client, run_id: str) -> bool:
    """Whether the event is stored; read from Redis because the run has not ended."""
    redis: Any = client.store.redis
    entries = redis.xrange(client.store.keys("events", run_id))
    return any(fields["name"] == "run.left_to_others" for _, fields in entries)
