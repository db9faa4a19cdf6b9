"""Restate: a handler whose steps are `ctx.run`, with a single server.

Server and SDK have their defaults; only the ports are set. Runs are sent one-way through the HTTP ingress.
The adapter waits for them by attaching to their idempotency key. The service is an ASGI app under hypercorn,
as in Restate's guide. The bytes are those of its log, which is compressed.

Recovery: the server knows one address for the service, so its process is started again at once, on the same
port. The server detects the closed connection and tries again, first after half a second, then after a
second.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import hypercorn.asyncio
import hypercorn.config
import peer
import restate
from processes import Child, NotMeasured, answers, bytes_of, free_port

PORT = "PEER_PORT"
IN_FLIGHT = 20  # submissions at once

runs = restate.Service("runs")


@runs.handler()
async def run(ctx: restate.Context, order: list[Any]) -> None:
    run_id, steps, size, pause_ms = order
    for n in range(steps):
        await ctx.run_typed(f"step {n}", peer.step, restate.RunOptions(), run_id, n, size, pause_ms)


async def work() -> None:
    config = hypercorn.config.Config()
    config.bind = [f"127.0.0.1:{os.environ[PORT]}"]
    config.errorlog = None
    await hypercorn.asyncio.serve(restate.app([runs]), config)


class Restate(peer.Peer):
    packages = ("restate-sdk", "hypercorn")
    restarts = True
    recovery_setting = "default-retry-policy: initial-interval = 500 ms, factor 2"

    def start(self) -> None:
        program = _program()
        names = ("RESTATE_BIND_PORT", "RESTATE_INGRESS__BIND_PORT", "RESTATE_ADMIN__BIND_PORT")
        ports = {name: str(free_port()) for name in names}
        self.data = self.folder / "restate"
        env = {
            **os.environ,
            **ports,
            "RESTATE_BASE_DIR": str(self.data),
            "RESTATE_BIND_IP": "127.0.0.1",
            "RESTATE_LISTEN_MODE": "tcp",
            "RESTATE_NODE_NAME": "peer",
            "RESTATE_DISABLE_TELEMETRY": "true",
            "RESTATE_LOG_FILTER": "warn",
        }
        server = Child("restate", [program, "--no-logo"], env, self.folder)
        self.held.callback(server.stop)
        self.servers.append(server)
        self.ingress = f"http://127.0.0.1:{ports['RESTATE_INGRESS__BIND_PORT']}"
        self._send = f"{self.ingress}/runs/run/send"
        self.admin = f"http://127.0.0.1:{ports['RESTATE_ADMIN__BIND_PORT']}"
        self.http = self.held.enter_context(httpx.Client(timeout=60))
        server.wait_until(self._is_healthy)
        self.env[PORT] = str(free_port())
        self.start_worker("worker")
        self._register()
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        self.server_version = said.split()[1]
        dump = [program, "--no-logo", "--dump-config"]
        config = subprocess.run(dump, env=env, capture_output=True, text=True, check=True).stdout
        synced = "rocksdb-disable-wal-fsync = false" in config
        self.durability = f"RocksDB log, fsync {'on' if synced else 'off'}, one replica"

    def _is_healthy(self) -> bool:
        try:
            places = (f"{self.admin}/health", f"{self.ingress}/restate/health")
            return all(self.http.get(place).status_code == 200 for place in places)
        except httpx.TransportError:
            return False

    def _register(self) -> None:
        address = {"uri": f"http://127.0.0.1:{self.env[PORT]}"}
        self.http.post(f"{self.admin}/deployments", json=address).raise_for_status()

    def start_worker(self, name: str) -> None:
        port = int(self.env[PORT])
        self.launch_worker(name, self.command("worker")).wait_until(lambda: answers(port))

    def submit(self, run_id: str, job: peer.Job) -> None:
        order = [run_id, *job.line()]
        self.http.post(self._send, json=order, headers=_key(run_id)).raise_for_status()

    def submit_many(self, run_ids: Sequence[str]) -> None:
        async def submit_all() -> None:
            places = asyncio.Semaphore(IN_FLIGHT)
            async with httpx.AsyncClient(timeout=60) as http:

                async def submit(run_id: str) -> None:
                    async with places:
                        order = [run_id, *peer.NOTHING.line()]
                        (await http.post(self._send, json=order, headers=_key(run_id))).raise_for_status()

                await asyncio.gather(*map(submit, run_ids))

        self.run_async(submit_all())

    def wait(self, run_id: str) -> None:
        place = f"{self.ingress}/restate/invocation/runs/run/{run_id}/attach"
        self.http.get(place).raise_for_status()

    def stored(self) -> dict[str, int]:
        """The log, compressed; the partition store has all of it again once its tables are flushed."""
        files = (file for kind in ("log", "sst") for file in self.data.rglob(f"*.{kind}"))
        return {"log": bytes_of(*(file for file in files if file.parent.name in ("log-store", "db")))}

    def more_facts(self) -> dict[str, str]:
        return {"Restate server": self.server_version}


def _key(run_id: str) -> dict[str, str]:
    return {"idempotency-key": run_id}


def _program() -> str:
    places = Path(sys.prefix).glob("npm/node_modules/@restatedev/restate-server-*/bin/restate-server")
    if (found := next(places, None)) is None:
        raise NotMeasured("npm has no Restate server for this machine")
    return str(found)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        asyncio.run(work())
    else:
        peer.serve(Restate)
