"""An installation: Redis, a model server, a worker, a producer. The only place that starts all of these.

All parts are real: the worker is a separate process, and the model answers over HTTP. Each test sets the
replies of the model.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openagents_worker.events import RunEvent, check_event
from openagents_worker.llm.script import ReplyScript, ScriptedFault, ScriptedReply
from openagents_worker.local.child_process import ChildProcess
from openagents_worker.local.stack import Stack
from openagents_worker.producer.client import Client
from openagents_worker.producer.handle import RunHandle
from openagents_worker.producer.task import AgentTask, ProducerTask
from openagents_worker.store.ttl import ttl_violations
from openagents_worker.testing.model_server import FAULTS, ModelServer, ModelServerRequest
from openagents_worker.testing.model_server.server import call_of
from tests.support import diary
from tests.support.waiting import PATIENCE_S, await_for

__all__ = ["PATIENCE_S", "Installation", "Model", "agent", "call", "installed", "story"]

ROOT = Path(__file__).parents[2]


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    """A tool call, in the form of the entries of `Model.will_say`."""
    return {"name": name, "arguments": arguments}


def agent(
    agent_id: str, *, tools: Mapping[str, str | dict[str, Any]] | None = None, **fields: Any
) -> dict[str, Any]:
    """An agent for the agents file that uses the model of the installation.

    `tools` maps ids to import paths or to entries of the agents file. The worker repeats a failed model
    request after a millisecond, so that tests do not wait.
    """
    llm = {
        "provider": "openai_compatible",
        "model": "test-model",
        "api_base": "${MODEL_URL}",
        "pricing": {"input": 1.0, "output": 10.0},
        "retry": {"max_attempts": 3, "initial_backoff_ms": 1, "max_backoff_ms": 1000},
    }
    return {
        "id": agent_id,
        "name": agent_id,
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
        "tools": [{"id": tool_id, **_tool_entry(tool)} for tool_id, tool in (tools or {}).items()],
        **fields,
        "llm": {**llm, **fields.get("llm", {})},
    }


def _tool_entry(tool: str | dict[str, Any]) -> dict[str, Any]:
    return {"impl": tool} if isinstance(tool, str) else tool


class Model:
    """The model server: its scripted replies and the requests that it got."""

    def __init__(self) -> None:
        self.server = ModelServer(self._reply, before_piece=self._before_piece)
        self._script = ReplyScript((), faults=FAULTS)
        self._tries: Counter[str] = Counter()
        self.may_answer: Callable[[str], object] = lambda run_id: True
        """Called with a run id before each reply, until it returns a true value. Then the reply is sent."""
        self.may_go_on: Callable[[int], object] = lambda piece: True
        """Called with the number of each streamed piece, from 0 on, until it returns a true value."""

    def will_say(self, *entries: dict[str, Any]) -> None:
        """Set the replies: the n-th turn of every run gets the n-th reply.

        A fault stands before a reply. It is the answer to the first tries of the turn of that reply.
        """
        self._script = ReplyScript(entries, faults=FAULTS)

    def asked(self, run_id: str) -> list[dict[str, Any]]:
        """The requests of a run in the order of their arrival: messages, tools, idempotency key, time."""
        log = self.server.log
        return [line for line in log if line["event"] == "received" and _belongs_to(line, run_id)]

    async def _before_piece(self, _: ModelServerRequest, number: int) -> None:
        await await_for(lambda: self.may_go_on(number), "the model may go on")

    async def _reply(self, request: ModelServerRequest) -> Any:
        key = call_of(request)
        await await_for(lambda: self.may_answer(key.partition(":")[0]), "the model may answer")
        entry: ScriptedReply | ScriptedFault | None = self._script.entry(request.n, self._tries[key])
        self._tries[key] += isinstance(entry, ScriptedFault)
        return entry or {"error": "response", "message": f"the script has no reply for turn {request.n}"}


def _belongs_to(line: Mapping[str, Any], run_id: str) -> bool:
    return str(line["key"]).startswith(f"{run_id}:")


@dataclass(frozen=True, slots=True)
class Installation:
    """A running deployment. `run_agent` is the object that a producer imports."""

    stack: Stack
    model: Model
    client: Client
    run_agent: AgentTask
    folder: Path
    worker: ChildProcess

    def submit(self, agent_id: str, input_text: str = "Go.", **fields: Any) -> RunHandle[Any]:
        """Submit a run, in a new session unless `session_id` is given."""
        session_id = fields.pop("session_id", None) or f"session-{uuid.uuid4().hex[:8]}"
        request = {"agent_id": agent_id, "session_id": session_id, "input_text": input_text, **fields}
        return self.run_agent.delay(request)

    def diary(self, run_id: str) -> list[dict[str, Any]]:
        """The lines that the tools of a run wrote to the diary, in order."""
        return diary.read(self.folder, run_id)


def story(handle: RunHandle[Any]) -> list[RunEvent]:
    """All events of a run until its end, as a watcher gets them. This function also checks them.

    Stored events are numbered without gaps and match their schemas. Exactly one is terminal, and the last one
    is final.
    """
    events = list(handle.events())
    stored = [event for event in events if event.seq is not None]
    assert [event.seq for event in stored] == list(range(1, len(stored) + 1))
    assert [problem for event in events for problem in check_event(event.name, event.payload)] == []
    assert [event.is_terminal for event in stored].count(True) == 1
    assert [event.final for event in stored].count(True) == 1
    assert (stored[-2].is_terminal, stored[-1].final) == (True, True)
    return events


@contextmanager
def installed(
    folder: Path,
    *agents: dict[str, Any],
    redis_url: str | None = None,
    producer_url: str | None = None,
    admin_url: str | None = None,
    say: Callable[[str, str], None] = lambda name, line: None,
    **env: str,
) -> Generator[Installation]:
    """Run a deployment with these agents during the block. At the end, check that no key lacks a TTL.

    Its tools write the diary to `folder`. `say` is called with the name of a process and a line that it
    prints. Without `redis_url`, a Redis is started. `producer_url` and `admin_url` are for Redis users with
    other rights: that of the producer, and one that may read all keys for the final check.
    """
    file = folder / "agents.json"
    file.write_text(json.dumps({"version": "1.0", "agents": list(agents)}))
    model = Model()
    with (
        model.server.serve_in_thread(),
        Stack(redis_url=redis_url, env=_environment(folder, model, env), say=say) as stack,
    ):
        worker = stack.start_worker("worker")
        with Client(producer_url, settings=None if producer_url else stack.settings) as client:
            task: AgentTask = client.app.register_task(ProducerTask())
            yield Installation(stack, model, client, task, folder, worker)
            assert ttl_violations(admin_url or stack.redis_url) == []


def _environment(folder: Path, model: Model, more: Mapping[str, str]) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        diary.DIARY: str(folder),
        "MODEL_URL": model.server.url,
        "OPENAGENTS_CONFIG": str(folder / "agents.json"),
        "OPENAGENTS_LEASE_MS": "2000",
        **more,
    }
