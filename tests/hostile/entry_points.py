"""Entry points: the only place that sends a test's input into the system, and returns the answer.

An entry point is a function of the world and one input. It returns `completed` or an error code: that of the
call that rejected the input, or that with which the run ended. Functions with other answers document them.
"""

from __future__ import annotations

import io
import json
import re
import socket
import uuid
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from openagents_worker.agents import load_agents
from openagents_worker.cli.commands import run
from openagents_worker.errors import OpenAgentsError, RecordUnreadable
from openagents_worker.producer.sse import sse
from tests.hostile.world import GOOD, RawReply, World
from tests.support.deployment import PATIENCE_S, call
from tests.support.hostile_server import Answer
from tests.support.waiting import wait_for

__all__ = ["ENTRY_POINTS"]

Alter = Callable[[redis.Redis, Any, str], object]
"""Changes what Redis holds: is given a client, `Keys` and the run's id."""


def request(world: World, fields: Mapping[str, Any]) -> str:
    """Submit a request with these fields by `run_agent.delay`."""
    return _submitted(world, lambda task: task.delay({**_own_session(), **fields}))


def options(world: World, given: Mapping[str, Any]) -> str:
    """Submit a valid request with these options of `apply_async`."""
    return _submitted(world, lambda task: task.apply_async((_own_session(),), **given))


def message(world: World, raw: bytes | Callable[[dict[str, Any]], Any]) -> str:
    """Put bytes into the queue, or a modified message in kombu's format.

    Returns `gone` if the message started no run and is in neither the queue nor the unacknowledged messages.
    """
    client, run_id = world.installation.client, uuid.uuid4().hex
    world.installation.model.will_say({"text": "fine"})
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
    world.next_run()  # it is queued after the message
    wait_for(lambda: not inside.hlen("unacked"), "no message is unacknowledged", PATIENCE_S)
    if not inside.exists(client.store.keys("run", run_id)):
        return "gone"
    return world.ended(client.handle(run_id))


def record(world: World, alter: Alter) -> str:
    """Change the stored state of a run that waits for its session.

    Another run holds the session until the change is made. It is submitted first, so that this one waits.
    """
    model, client = world.installation.model, world.installation.client
    model.will_say({"text": "fine"})
    holder, session_id = f"first-{uuid.uuid4().hex}", f"session-{uuid.uuid4().hex[:8]}"
    held = {holder}
    model.may_answer = lambda run_id: run_id not in held
    first = world.installation.run_agent.apply_async(({**GOOD, "session_id": session_id},), task_id=holder)
    second = world.submit(session_id=session_id)
    world.altered |= {second.id, session_id}
    try:
        alter(client.store.redis, client.store.keys, second.id)
    finally:
        held.clear()
    try:
        ended = world.ended(second)
    except RecordUnreadable as error:
        ended = world.refused(error)
    first.wait(PATIENCE_S)
    return ended


def agents_file(world: World, text: str | bytes | Mapping[str, Any]) -> str:
    """Load the text of an agents file, or fields of its only agent. `loaded` if it is accepted."""
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
            return world.refused(error)
    return "loaded"


def reply(world: World, raw: bytes | RawReply | Answer) -> str:
    """Send a complete body of a model's reply as JSON, or any HTTP response."""
    world.raw.reply = RawReply(raw) if isinstance(raw, bytes) else raw
    return world.ended(world.submit("raw", budget={"max_resume_attempts": 0}))


def anthropic_reply(world: World, sent: list[Any]) -> str:
    """Send a reply to the Anthropic client: one value as a whole body, several as the events of a stream."""
    return _sent_by(world, "anthropic", sent)


def responses_reply(world: World, sent: list[Any]) -> str:
    """Send a reply to the client of OpenAI's responses: one value as a whole body, several as a stream."""
    return _sent_by(world, "openai_responses", sent)


def _sent_by(world: World, provider: str, sent: list[Any]) -> str:
    if len(sent) == 1:
        world.raw.reply = RawReply(json.dumps(sent[0]).encode())
    else:
        events = "".join(f"data: {json.dumps(event)}\n\n" for event in sent)
        world.raw.reply = RawReply(events.encode(), content_type="text/event-stream")
    return world.ended(world.submit(f"raw_{provider}", budget={"max_resume_attempts": 0}))


def stream(world: World, raw: bytes | Answer) -> str:
    """Send the body of a streamed reply."""
    whole = isinstance(raw, Answer)
    return reply(world, raw if whole else RawReply(raw, content_type="text/event-stream"))


def answer(world: World, given: tuple[Any, Any]) -> str:
    """A producer's output schema, and the model's answer that is checked against it."""
    schema, said = given
    world.installation.model.will_say({"text": said if isinstance(said, str) else json.dumps(said)})
    return world.ended(world.submit(output_type=schema, budget={"max_validation_retries": 0}))


def arguments(world: World, given: tuple[str, Any]) -> str:
    """A tool, and the arguments of a model's call. The code is that of the tool's failure."""
    tool, said = given
    world.installation.model.will_say({"tool_calls": [call(tool, **said)]}, {"text": "fine"})
    return world.tool_ended(world.submit("shop"))


def tool_result(world: World, source: str) -> str:
    """A Python expression; the tool returns its value. The code is that of the tool's failure, if any."""
    return world.tool_ended(world.lets_tool("give", what="returns", value=source))


def mcp(world: World, given: tuple[str, bytes]) -> str:
    """What an MCP server sends in answer to a method. `ID` stands for the id of the request.

    The model calls its tool `look`. The code is that of the tool's failure, or that of the run.
    """
    method, raw = given
    world.mcp_answer.write_bytes(method.encode() + b"\n" + raw)
    world.installation.model.will_say({"tool_calls": [call("look")]}, {"text": "fine"})
    return world.tool_ended(world.submit("remote", budget={"max_resume_attempts": 0}))


def tool_error(world: World, source: str) -> str:
    """A Python expression; the tool raises its value."""
    return world.tool_ended(world.lets_tool("give", what="raises", value=source))


def event(world: World, source: str | tuple[str, str]) -> str:
    """An expression for the payload of an event that a tool emits, or a pair of event name and expression.

    With the name `each`, the expression is a list of payloads, and each one is emitted.
    """
    if isinstance(source, tuple) and source[0] == "each":
        return world.tool_ended(
            world.lets_tool("give", what="emits each", value=source[1], name="custom.each")
        )
    name, value = source if isinstance(source, tuple) else ("custom.event", source)
    return world.tool_ended(world.lets_tool("give", what="emits", value=value, name=name))


def state(world: World, source: str | tuple[str, str]) -> str:
    """An expression for a value that a tool writes to the session's state, or a pair of names and values."""
    if isinstance(source, tuple):
        return world.tool_ended(world.lets_tool("give", what="states", value=source[1]))
    return world.tool_ended(world.lets_tool("give", what="state", value=source))


def artifact(world: World, source: str) -> str:
    """An expression for the payload of an artifact."""
    return world.tool_ended(world.lets_tool("give", what="artifact", value=source))


def url(world: World, address: str) -> str:
    """A URL that a model passes to `http_request`."""
    return world.tool_ended(world.lets_tool("fetch", url=address))


def header(world: World, headers: Mapping[str, str] | Answer) -> str:
    """Headers of a valid model reply, or a complete reply with invalid headers."""
    if isinstance(headers, Answer):
        return reply(world, headers)
    body = json.dumps({"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}).encode()
    return reply(world, RawReply(body, headers=headers))


def last_event_id(world: World, given: str) -> str:
    """The header `Last-Event-ID` of a request for a run's events. `completed` if it is accepted."""
    try:
        sse(world.installation.client.handle("r1"), given)
    except OpenAgentsError as error:
        return world.refused(error)
    return "completed"


def cli(world: World, arguments: list[str]) -> str:
    """Run `openagents-worker` with these arguments in this process.

    The answer is `exit N`, or `exit N code` if it printed one of the library's error codes. A traceback fails
    the test, because it is a bug of the command.
    """
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), redirect_stderr(shown):
        patch.setattr("sys.argv", ["openagents-worker", *arguments])
        for name in ("REDIS", "BROKER"):
            patch.setenv(f"OPENAGENTS_{name}_URL", world.installation.stack.redis_url)
        with pytest.raises(SystemExit) as ended:
            run()
    text = shown.getvalue()
    world.shown.append(text)
    world.printed.append(text)
    assert "Traceback" not in text, text
    code = CODE.search(text) if ended.value.code else None
    return f"exit {int(ended.value.code or 0)}" + (f" {code[1] or code[2]}" if code else "")


CODE = re.compile(r"""^error: ([a-z_]+\.[a-z_]+): |^\{"error": \{.*?"code": "([a-z_.]+)\"""", re.MULTILINE)
"""Of an error as a command prints it, as text or as JSON."""


def page(world: World, asked: str | bytes) -> str:
    """A path of Flower with its query, or a complete HTTP request. The answer is the HTTP status as text.

    `closed` if Flower closes the connection without a reply.
    """
    where = urlsplit(world.flower())
    text = f"GET {asked} HTTP/1.1\r\nhost: {where.netloc}\r\nconnection: close\r\n\r\n"
    raw = asked if isinstance(asked, bytes) else text.encode("utf-8", "surrogatepass")
    with socket.create_connection((where.hostname or "", where.port or 0), PATIENCE_S) as connection:
        answer = _answer_to(connection, raw)
    head, _, body = answer.partition(b"\r\n\r\n")
    world.shown.append(body.decode("utf-8", "replace"))
    return head.split()[1].decode() if head.startswith(b"HTTP/1.") else "closed"


def _answer_to(connection: socket.socket, raw: bytes) -> bytes:
    """Read until the other side closes the connection, which it may do before it has read everything."""
    parts = []
    try:
        connection.sendall(raw)
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


ENTRY_POINTS: Mapping[str, Callable[[World, Any], str]] = {
    entry_point.__name__: entry_point
    for entry_point in (
        request,
        options,
        message,
        record,
        agents_file,
        reply,
        anthropic_reply,
        responses_reply,
        stream,
        answer,
        arguments,
        tool_result,
        mcp,
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
        return world.refused(error)
    return world.ended(handle)


def _envelope(run_id: str, queue: str) -> dict[str, Any]:
    """A message as kombu's Redis transport stores it. Its body is not encoded yet."""
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
