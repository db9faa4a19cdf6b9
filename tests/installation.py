"""An installation: Redis, a model server, a worker, a producer. The only place where tests make a whole one.

All of it is real: the worker is a process of its own, the model answers over HTTP. What the model says next
is said by the test.
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
from openagents_worker.store.keys import ttl_violations
from openagents_worker.testing.model_server import FAULTS, ModelRequest, ModelServer
from tests import diary
from tests.waiting import PATIENCE_S, await_for

__all__ = ["PATIENCE_S", "Installation", "Model", "agent", "call", "installed", "story"]

ROOT = Path(__file__).parents[1]


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    """A tool call, as it stands in what the model says."""
    return {"name": name, "arguments": arguments}


def agent(
    agent_id: str, *, tools: Mapping[str, str | dict[str, Any]] | None = None, **fields: Any
) -> dict[str, Any]:
    """An agent for the agents file, on the installation's model; `tools` are ids and what is behind them.

    Its model repeats a failed request after a millisecond, so that tests need not wait for it.
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
        "tools": [{"id": tool_id, **_reference(tool)} for tool_id, tool in (tools or {}).items()],
        **fields,
        "llm": {**llm, **fields.get("llm", {})},
    }


def _reference(tool: str | dict[str, Any]) -> dict[str, Any]:
    return {"impl": tool} if isinstance(tool, str) else tool


class Model:
    """What the model says, and what it was asked."""

    def __init__(self) -> None:
        self.server = ModelServer(self._reply, before_piece=self._before_piece)
        self._script = ReplyScript((), faults=FAULTS)
        self._tries: Counter[str] = Counter()
        self.may_answer: Callable[[str], object] = lambda run_id: True
        """Asked about a run before each reply to it, until it says so."""
        self.may_go_on: Callable[[int], object] = lambda piece: True
        """Asked about a piece of a streamed reply, counted from 0, until it says so."""

    def will_say(self, *entries: dict[str, Any]) -> None:
        """From now on the n-th turn of every run is answered with the n-th of these replies.

        A fault meets the first tries of the turn whose reply follows it.
        """
        self._script = ReplyScript(entries, faults=FAULTS)

    def asked(self, run_id: str) -> list[dict[str, Any]]:
        """The requests of a run in the order in which they came: messages, tools, key, time."""
        log = self.server.log
        return [line for line in log if line["event"] == "received" and _is_of(line, run_id)]

    async def _before_piece(self, _: ModelRequest, number: int) -> None:
        await await_for(lambda: self.may_go_on(number), "the model may go on")

    async def _reply(self, asked: ModelRequest) -> Any:
        key = asked.headers["idempotency-key"]
        await await_for(lambda: self.may_answer(key.partition(":")[0]), "the model may answer")
        entry: ScriptedReply | ScriptedFault | None = self._script.entry(asked.n, self._tries[key])
        self._tries[key] += isinstance(entry, ScriptedFault)
        return entry or {"error": "response", "message": f"nothing was scripted for turn {asked.n}"}


def _is_of(line: Mapping[str, Any], run_id: str) -> bool:
    return str(line["key"]).startswith(f"{run_id}:")


@dataclass(frozen=True, slots=True)
class Installation:
    """A deployment that runs, seen from a test. `run_agent` is what a producer imports."""

    stack: Stack
    model: Model
    client: Client
    run_agent: AgentTask
    folder: Path
    worker: ChildProcess

    def submit(self, agent_id: str, input_text: str = "Go.", **fields: Any) -> RunHandle[Any]:
        """A run, in a session of its own unless one is given."""
        session_id = fields.pop("session_id", None) or f"session-{uuid.uuid4().hex[:8]}"
        request = {"agent_id": agent_id, "session_id": session_id, "input_text": input_text, **fields}
        return self.run_agent.delay(request)

    def diary(self, run_id: str) -> list[dict[str, Any]]:
        """What the tools of a run wrote down themselves, in their order."""
        return diary.read(self.folder, run_id)


def story(handle: RunHandle[Any]) -> list[RunEvent]:
    """All events of a run until its end, as a watcher gets them, each of them checked.

    Stored events are counted without gaps and are what they are declared to be; exactly one of them is
    terminal, and the final one is the last.
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
    """A whole deployment with these agents for as long as the block lasts; no key is left for ever by it.

    Its tools keep their diary in the folder; `say` hears each line that a process prints. Without `redis_url`
    it has a Redis of its own; the two other URLs are for users with other rights than the worker's: the
    producer, and whoever looks at all keys.
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
