"""A process that uses all kinds of connections, forks, uses them in parent and child, and prints the
results."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from openagents_worker.llm.connection_pool import ConnectionPool
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.producer.publisher import send_wakes
from openagents_worker.store.pubsub import subscribed_inbox
from openagents_worker.store.scripts import Wake
from openagents_worker.tools.builtin.http import HttpRequest

REDIS_URL, MODEL_URL = sys.argv[1:3] if len(sys.argv) > 2 else ("", "")


WAKE = Wake("r1", "agents", 1, "assistant", "s1", 0, 0, "")


class Everything:
    """One of each."""

    def __init__(self) -> None:
        self.client = Client(REDIS_URL)
        self.twin = AsyncClient(REDIS_URL)
        self.ports: list[int] = []
        self.http = httpx.AsyncClient(
            transport=ConnectionPool(MODEL_URL), event_hooks={"response": [self._note]}
        )
        self.tool = HttpRequest({"deny_private_networks": False})

    async def _note(self, response: httpx.Response) -> None:
        self.ports.append(response.extensions["network_stream"].get_extra_info("client_addr")[1])

    async def connections(self) -> dict[str, Any]:
        """The connection of each kind: its id on the server, or its port on this side."""
        await self.http.get(f"{MODEL_URL}/models")
        tool_client = await self.tool._open_client()
        tool_client.event_hooks = {"response": [self._note]}
        await self.tool.invoke({"url": f"{MODEL_URL}/models"}, None)
        return {
            "sync": self.client.store.ask(lambda r: r.client_id()),
            "async": await self.twin.store.ask(lambda r: r.client_id()),
            "lane": await self.twin.store._batcher.execute("CLIENT", "ID"),
            "model": self.ports[-2],
            "tool": self.ports[-1],
        }


def sockets() -> int:
    """The number of open sockets of this process that are connected to another process."""
    connected, count = _connected(), 0
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them is closed already
            count += str(file.readlink()) in connected
    return count


def _connected() -> set[str]:
    """The TCP connections that are established, as the system names their files."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text("utf-8").splitlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if row[3] == "01"}


def main() -> None:
    everything, loop = Everything(), asyncio.new_event_loop()

    async def listened() -> dict[str, Any]:
        async with subscribed_inbox(everything.twin.store.cell, "oa:events:nothing"):
            await everything.connections()  # from now on there is one for each
            return await everything.connections()

    before = loop.run_until_complete(listened())
    assert send_wakes(everything.client.app, [WAKE]) == 1
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        found = {"inherited_sockets": sockets(), "child": asyncio.run(everything.connections())}
        found["child_sends"] = send_wakes(everything.client.app, [WAKE])
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found = json.loads(pipe.read())
    os.waitpid(child, 0)
    after = loop.run_until_complete(everything.connections())
    assert send_wakes(everything.client.app, [WAKE]) == 1
    print(json.dumps({**found, "before": before, "after": after}))


if __name__ == "__main__":
    main()
