"""The world of these tests: a real Redis, one real worker process, a real HTTP server in the model's place.

The model server has two halves: the scripted one answers the agent `clerk`, the raw one answers the agent
`raw` with whatever bytes a test gives it.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openagents_worker.errors import RunFailed
from openagents_worker.producer.handle import RunHandle
from tests.installation import PATIENCE_S, Installation, agent, call, installed

__all__ = ["GOOD", "RawModel", "RawReply", "World", "world_in"]

GOOD = {"agent_id": "clerk", "session_id": "s1", "input_text": "Go."}
TOOLS = {
    "give": "tests.hostile.tools.give",
    "fetch": {"type": "http_request", "config": {}},
}
COMPLETED = "completed"


@dataclass(frozen=True)
class RawReply:
    """An HTTP response. Content-Length is added unless `headers` say how the body ends."""

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


class RawModel:
    """An HTTP server that answers every request with the same bytes, on a loop in a thread of its own."""

    def __init__(self) -> None:
        self.reply = RawReply(b"{}")
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
        connections: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._answer(reader, writer), name="raw reply")
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=2**26)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        await self._over.wait()
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            self.asked.append(head + await reader.readexactly(int(length[1]) if length else 0))
            writer.write(self.reply.encoded())
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has had enough
        finally:
            writer.transport.abort() if writer.transport.is_closing() else writer.close()


@dataclass
class World:
    """What a door needs; `next_run` is the proof that the worker still works."""

    installation: Installation
    raw: RawModel
    flower_url: str = ""

    def submit(self, agent_id: str = "clerk", **fields: Any) -> RunHandle[Any]:
        return self.installation.submit(agent_id, **fields)

    def ended(self, handle: RunHandle[Any]) -> str:
        """`completed`, or the code with which a run has ended."""
        result = handle.wait(PATIENCE_S)
        if result.ok:
            return COMPLETED
        try:
            return str(result.output)
        except RunFailed as error:
            return error.code

    def tool_ended(self, handle: RunHandle[Any]) -> str:
        """The code with which the run's tool has failed; else how the run has ended."""
        ended = self.ended(handle)
        failed = [event for event in handle.events() if event.name == "tool.failed"]
        return str(failed[-1].payload["code"]) if failed and ended == COMPLETED else ended

    def next_run(self) -> None:
        """The worker executes a run that was submitted after the input."""
        self.installation.model.will_say({"text": "fine"})
        assert self.submit().wait(PATIENCE_S).final_output == "fine"

    def lets_tool(self, tool: str, **arguments: Any) -> RunHandle[Any]:
        """A run whose model calls this tool once."""
        self.installation.model.will_say({"tool_calls": [call(tool, **arguments)]}, {"text": "fine"})
        return self.submit()

    def flower(self) -> str:
        """The URL of a Flower, which is started when the first test asks for it."""
        self.flower_url = self.flower_url or self.installation.stack.start_flower()
        return self.flower_url


@contextmanager
def world_in(folder: Path) -> Generator[World]:
    raw = RawModel()
    agents = (
        agent("clerk", tools=TOOLS),
        agent("raw", llm={"api_base": "${RAW_URL}/v1", "retry": {"max_attempts": 1}}),
    )
    with ExitStack() as stack:
        stack.enter_context(raw.serve())
        settings = {"RAW_URL": raw.url, "OPENAGENTS_MAX_RESUME_ATTEMPTS": "0"}
        yield World(stack.enter_context(installed(folder, *agents, **settings)), raw)
