"""The doors. The only place that knows how a test's input reaches the system, and what answer came back.

A door takes the world and one input, and returns `completed` or the code of the error: that of the call that
refused the input, else that with which its run has ended. A door with another answer says so.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import redis
from click.testing import CliRunner

from openagents_worker.agents import load_agents
from openagents_worker.cli.commands import commands
from openagents_worker.errors import OpenAgentsError
from openagents_worker.producer.sse import sse
from tests.hostile.world import GOOD, RawReply, World
from tests.installation import PATIENCE_S
from tests.waiting import wait_for

__all__ = ["DOORS"]

Alter = Callable[[redis.Redis, Any, str], object]
"""Changes what Redis holds: is given a client, `Keys` and the run's id."""


def request(world: World, fields: Mapping[str, Any]) -> str:
    """A request with these fields, submitted by `run_agent.delay`."""
    return _submitted(world, lambda task: task.delay({**_own_session(), **fields}))


def options(world: World, given: Mapping[str, Any]) -> str:
    """A good request with these options of `apply_async`."""
    return _submitted(world, lambda task: task.apply_async((_own_session(),), **given))


def message(world: World, raw: bytes | Callable[[dict[str, Any]], Any]) -> str:
    """Bytes that lie in the queue, or a change to a message of kombu's shape before it is put there.

    Returns `gone` when no run came of it, and the message lies neither in the queue nor among those taken.
    """
    client, run_id = world.installation.client, uuid.uuid4().hex
    queue = client.settings.queue
    if callable(raw):
        envelope = _envelope(run_id, queue)
        changed = raw(envelope)
        item = changed if isinstance(changed, bytes) else json.dumps(changed or envelope).encode()
    else:
        item = raw
    inside = client.store.redis
    inside.lpush(queue, item)
    wait_for(lambda: not inside.llen(queue), "the message is taken", PATIENCE_S)
    world.next_run()  # it stands behind the message
    wait_for(lambda: not inside.hlen("unacked"), "no message is left half-way", PATIENCE_S)
    if not inside.exists(client.store.keys("run", run_id)):
        return "gone"
    return world.ended(client.handle(run_id))


def record(world: World, alter: Alter) -> str:
    """A run whose stored state is changed while it waits for its session."""
    model, client = world.installation.model, world.installation.client
    model.will_say({"text": "fine"})
    session_id = f"session-{uuid.uuid4().hex[:8]}"
    held = {f"first-{uuid.uuid4().hex}"}
    model.may_answer = lambda run_id: run_id not in held
    first = world.installation.run_agent.apply_async(
        ({**GOOD, "session_id": session_id},), task_id=next(iter(held))
    )
    try:
        second = world.submit(session_id=session_id)
        alter(client.store.redis, client.store.keys, second.id)
    finally:
        held.clear()
    first.wait(PATIENCE_S)
    return world.ended(second)


def agents_file(world: World, text: str | bytes | Mapping[str, Any]) -> str:
    """The text of an agents file, or fields that are added to its one agent. `loaded` when it is accepted."""
    if isinstance(text, Mapping):
        one = {
            "id": "a",
            "name": "a",
            "llm": {"provider": "mock"},
            "pattern": {"type": "react"},
            "memory": {"type": "buffer"},
        }
        text = json.dumps({"version": "1.0", "agents": [{**one, **text}]})
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "agents.json"
        path.write_bytes(raw)
        try:
            load_agents(path)
        except OpenAgentsError as error:
            return error.code
    return "loaded"


def reply(world: World, raw: bytes | RawReply) -> str:
    """The whole body of a model's reply as JSON, or any HTTP response."""
    world.raw.reply = raw if isinstance(raw, RawReply) else RawReply(raw)
    return world.ended(world.submit("raw"))


def stream(world: World, raw: bytes) -> str:
    """The body of a streamed reply."""
    world.raw.reply = RawReply(raw, content_type="text/event-stream")
    handle = world.submit("raw")
    return world.ended(handle)


def tool_result(world: World, source: str) -> str:
    """A Python expression whose value a tool returns. The code is that of the tool's failure, if any."""
    return world.tool_ended(world.lets_tool("give", what="returns", value=source))


def tool_error(world: World, source: str) -> str:
    """A Python expression for an exception that a tool raises."""
    return world.tool_ended(world.lets_tool("give", what="raises", value=source))


def event(world: World, source: str | tuple[str, str]) -> str:
    """An expression for the payload of an event that a tool emits; as a pair, its name goes before."""
    name, value = source if isinstance(source, tuple) else ("custom.event", source)
    return world.tool_ended(world.lets_tool("give", what="emits", value=value, name=name))


def state(world: World, source: str) -> str:
    """An expression for a value that a tool puts into the session's state."""
    return world.tool_ended(world.lets_tool("give", what="state", value=source))


def artifact(world: World, source: str) -> str:
    """An expression for the payload of an artifact."""
    return world.tool_ended(world.lets_tool("give", what="artifact", value=source))


def url(world: World, address: str) -> str:
    """A URL that a model asks `http_request` to fetch."""
    return world.tool_ended(world.lets_tool("fetch", url=address))


def header(world: World, headers: Mapping[str, str]) -> str:
    """Headers of a model's reply."""
    body = json.dumps({"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}).encode()
    return reply(world, RawReply(body, headers=headers))


def last_event_id(world: World, given: str) -> str:
    """The header `Last-Event-ID` of somebody who watches a run. `completed` when it is accepted."""
    try:
        sse(world.installation.client.handle("r1"), given)
    except OpenAgentsError as error:
        return error.code
    return "completed"


def cli(world: World, arguments: list[str]) -> str:
    """Arguments of `openagents-worker`. The answer is `exit N`; a foreign exception fails the test."""
    env = {"OPENAGENTS_REDIS_URL": world.installation.stack.redis_url}
    done = CliRunner().invoke(commands, arguments, env=env)
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return f"exit {done.exit_code}"


def page(world: World, path: str) -> str:
    """A path of Flower, with its query. The answer is the HTTP status as text."""
    try:
        with urllib.request.urlopen(world.flower() + path, timeout=PATIENCE_S) as answer:  # noqa: S310
            return str(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return str(error.code)


DOORS: Mapping[str, Callable[[World, Any], str]] = {
    door.__name__: door
    for door in (
        request,
        options,
        message,
        record,
        agents_file,
        reply,
        stream,
        tool_result,
        tool_error,
        event,
        state,
        artifact,
        url,
        header,
        last_event_id,
        cli,
        page,
    )
}


def _own_session() -> dict[str, str]:
    return {**GOOD, "session_id": f"session-{uuid.uuid4().hex[:8]}"}


def _submitted(world: World, submit: Callable[[Any], Any]) -> str:
    world.installation.model.will_say({"text": "fine"})
    try:
        handle = submit(world.installation.run_agent)
    except OpenAgentsError as error:
        return error.code
    return world.ended(handle)


def _envelope(run_id: str, queue: str) -> dict[str, Any]:
    """A message from outside, as kombu's Redis transport stores one; its body is not encoded yet."""
    body = [[{**_own_session(), "run_id": run_id}], {}, {}]
    return {
        "body": json.dumps(body),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": "tasks.run_agent", "id": run_id, "root_id": run_id},
        "properties": {
            "correlation_id": run_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": None,
            "delivery_tag": uuid.uuid4().hex,
        },
    }
