"""The world of these tests: a real Redis, a real worker process, and a real HTTP server as the model.

The model server has two parts. The scripted part answers the agents `clerk` and `shop`. The raw part answers
the agent `raw` with any bytes from a test, and the agent `next` with a valid reply. So the next run uses the
connection pool that has received hostile replies.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openagents_worker.errors import OpenAgentsError, RunFailed
from openagents_worker.producer.handle import RunHandle
from openagents_worker.testing.model_server.listening import Listening
from tests.support import mcp_raw_server
from tests.support.deployment import PATIENCE_S, Installation, agent, call, installed
from tests.support.hostile_server import MB, Answer

__all__ = ["BUILTIN", "GOOD", "RawModel", "RawReply", "World", "world_in"]

GOOD = {"agent_id": "clerk", "session_id": "s1", "input_text": "Go."}
TOOLS = {
    "give": "tests.hostile.tools.give",
    "fetch": {"type": "http_request", "config": {}},
}
BUILTIN = (
    "calc", "current_time", "date_diff", "date_parse", "json_parse", "text_transform", "list_files",
    "read_file", "grep_files", "http_request", "builtin_search", "get_env", "host_lookup", "min_max",
    "query_param", "random_choice", "random_int", "random_string", "set_env", "url_build", "url_parse",
    "shell_exec", "execute_command",
)  # fmt: skip
OF_SCHEMAS = ("Catastrophe", "Multiplied", "Strict")
COMPLETED = "completed"
MCP_TIMEOUT_MS = 6_000  # an answer that cannot be read is never there


@dataclass(frozen=True)
class RawReply:
    """An HTTP response. Content-Length is added unless `headers` define how the body ends."""

    body: bytes
    content_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        headers = {"content-type": self.content_type, **self.headers}
        names = {name.lower() for name in headers}
        if not names & {"content-length", "transfer-encoding"}:
            headers["content-length"] = str(len(self.body))
        lines = [f"HTTP/1.1 {self.status} x", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1", "replace") + self.body


FINE = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}
GOOD_REPLY = RawReply(json.dumps(FINE).encode())


class RawModel:
    """An HTTP server that answers every request with the same bytes, on an event loop in another thread.

    Requests below `/next` get a valid reply.
    """

    def __init__(self) -> None:
        self.reply: RawReply | Answer = RawReply(b"{}")
        self.asked: list[bytes] = []
        """The requests as they came."""
        self.url = ""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="raw model")
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._over: asyncio.Event

    @contextmanager
    def serve(self) -> Generator[None]:
        self._thread.start()
        self._started.wait()
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join()

    async def _main(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        listening = Listening(self._answer, name="raw reply")
        await listening.start(max_line_bytes=2**26)
        self.url = f"http://127.0.0.1:{listening.port}"
        self._started.set()
        await self._over.wait()
        await listening.stop()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            asked = head + await reader.readexactly(int(length[1]) if length else 0)
            is_next = head.startswith(b"POST /next/")
            if not is_next:
                self.asked.append(asked)
            await _write(writer, GOOD_REPLY if is_next else self.reply)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has had enough
        finally:
            left = writer.transport.get_write_buffer_size()
            writer.transport.abort() if writer.transport.is_closing() or left > MB else writer.close()


async def _write(writer: asyncio.StreamWriter, reply: RawReply | Answer) -> None:
    if isinstance(reply, RawReply):
        writer.write(reply.encoded())
        await writer.drain()
        return
    async with aclosing(reply.pieces()) as pieces:
        async for piece in pieces:
            writer.write(piece)
            await writer.drain()


@dataclass
class World:
    """The services that an entry point needs. `goes_on` proves that the worker still works.

    `shown` collects outputs for an input: texts of errors, output of commands, pages. `printed` is the part
    that was written to a terminal. `log` is the worker's whole log. `altered` has the ids of runs and
    sessions whose records a test has changed.
    """

    installation: Installation
    raw: RawModel
    mcp_answer: Path
    flower_url: str = ""
    shown: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    altered: set[str] = field(default_factory=set)
    last_run: str = ""
    _next: tuple[str, RunHandle[Any]] | None = None

    def submit(self, agent_id: str = "clerk", **fields: Any) -> RunHandle[Any]:
        handle = self.installation.submit(agent_id, **fields)
        if agent_id != "next":
            self.last_run = handle.id
        return handle

    def refused(self, error: OpenAgentsError) -> str:
        """The code of an error. All its texts are added to `shown`."""
        notes = getattr(error, "__notes__", [])
        self.shown.append(f"{error} {error!r} {error.hint} {notes} {error.to_dict()}")
        return error.code

    def ended(self, handle: RunHandle[Any]) -> str:
        """`completed`, or the code with which the run ended."""
        result = handle.wait(PATIENCE_S)
        if result.ok:
            return COMPLETED
        try:
            return str(result.output)
        except RunFailed as error:
            return self.refused(error)

    def tool_ended(self, handle: RunHandle[Any]) -> str:
        """The code with which the run's tool failed; otherwise how the run ended."""
        ended = self.ended(handle)
        events = list(handle.events())
        self.shown.extend(event.to_json() for event in events)
        failed = [event for event in events if event.name == "tool.failed"]
        return str(failed[-1].payload["code"]) if failed and ended == COMPLETED else ended

    def goes_on(self, after: str) -> None:
        """Submit a run after this input. The next call waits for it, so that the worker is busy meanwhile."""
        self.went_on()
        self._next = after, self.submit("next")

    def went_on(self) -> None:
        """Wait until the run after the last input has been executed."""
        if self._next is not None:
            (after, handle), self._next = self._next, None
            result = handle.wait(PATIENCE_S)
            assert result.final_output == "fine", f"the run after {after}: {result!r}"

    def next_run(self) -> None:
        """Execute a run on the worker now."""
        assert self.submit("next").wait(PATIENCE_S).final_output == "fine"

    def lets_tool(self, tool: str, **arguments: Any) -> RunHandle[Any]:
        """A run whose model calls this tool once."""
        self.installation.model.will_say({"tool_calls": [call(tool, **arguments)]}, {"text": "fine"})
        return self.submit()

    def flower(self) -> str:
        """The URL of a Flower. It is started when the first test needs it."""
        self.flower_url = self.flower_url or self.installation.stack.start_flower()
        return self.flower_url


@contextmanager
def world_in(folder: Path) -> Generator[World]:
    raw, log = RawModel(), list[str]()
    shop = {
        **{name: {"type": name} for name in BUILTIN},
        **{name.lower(): f"tests.hostile.schemas.{name}" for name in OF_SCHEMAS},
    }
    mcp_answer = folder / "mcp_answer"
    remote = {
        "server": {
            "command": sys.executable,
            "args": ["-I", "-S", mcp_raw_server.__file__, str(mcp_answer)],
            "init_timeout_ms": MCP_TIMEOUT_MS,
        },
        "probe_on_preflight": True,
        "call_timeout_ms": MCP_TIMEOUT_MS,
    }
    agents = (
        agent("clerk", tools=TOOLS),
        agent("shop", tools=shop),
        agent("remote", tools={"srv": {"type": "mcp", "config": remote}}),
        agent("raw", llm={"api_base": "${RAW_URL}/v1", "retry": {"max_attempts": 1}}),
        *(
            agent(
                f"raw_{provider}",
                llm={
                    "provider": provider,
                    "api_base": "${RAW_URL}/v1",
                    "retry": {"max_attempts": 1},
                    "max_reply_bytes": 256 * 1024,
                },
            )
            for provider in ("anthropic", "openai_responses")
        ),
        agent("next", llm={"api_base": "${RAW_URL}/next/v1", "retry": {"max_attempts": 1}}),
    )
    with ExitStack() as stack:
        stack.enter_context(raw.serve())
        settings = {
            "RAW_URL": raw.url,
            "OPENAGENTS_CHECK_CPU_S": "0.3",
            "OPENAGENTS_LOG_FORMAT": "json",
        }
        installation = stack.enter_context(
            installed(folder, *agents, say=lambda name, line: log.append(line), **settings)
        )
        world = World(installation, raw, mcp_answer, log=log)
        yield world
        world.went_on()
